"""The mathematics of the models: attention, positions, norms, MLP, low-rank adapters, losses.

One legend of shape suffixes for the whole project: B batch, T tokens (queries), S tokens (keys),
D model width, N query heads, K key/value heads, G query heads per key/value head, H head width,
F hidden width of the MLP, E experts, V vocabulary, R rank.
"""
