"""Procedural problems: twelve families of arithmetic reasoning with exact traces and answers.

They are the data of the nano line, made on the spot and without download. Difficulty has two
dials, the number of steps and a `Level` of number sizes; wording is varied by a paraphrase grammar
over a small vocabulary. One family is one file.
"""

from phikit.data.procedural.check import FamilySummary, check_trace, skeleton, summary
from phikit.data.procedural.draft import Draft, Level
from phikit.data.procedural.generate import DEFAULT_STEPS, FAMILIES, generate, stream

__all__ = [
    "DEFAULT_STEPS",
    "FAMILIES",
    "Draft",
    "FamilySummary",
    "Level",
    "check_trace",
    "generate",
    "skeleton",
    "stream",
    "summary",
]
