"""Evaluation: a Task is problems, a Solver and a Scorer; the rest is statistics and showing them.

Import from the modules; this file stays empty so that a scorer does not cost matplotlib or torch.
"""
