"""GRIN's claims, each tested by what was written down before it ran."""

from importlib import import_module

from experiments.grin.claim import Claim

NUMBERS = ("C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8")


def claim(number: str) -> Claim:
    """The claim of that number."""
    return import_module(f"experiments.grin.{number.lower()}").CLAIM
