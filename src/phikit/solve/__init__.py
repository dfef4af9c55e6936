"""Solvers: from problems to replies, by one or many calls to a model."""
