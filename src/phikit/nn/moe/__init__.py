"""Mixture of experts: routers, the gradient of a choice, experts, balance, and their training.

Router and experts are apart. A router turns tokens into a `Routing` and is the only part in which
methods differ (`router`); experts compute whatever they are sent (`experts`). There is no capacity,
and no token is ever dropped. What happens in training alone, chance and balance, lives in a
`RouterSession` (`session`): without one every router is a deterministic function of its input.

More shape suffixes: C choices of a token, A assignments (T x C rows, sorted by expert), and T
counts all tokens of a batch, rows after one another.
"""
