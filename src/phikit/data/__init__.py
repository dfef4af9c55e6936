"""Data: problems and their splits, procedural generation, the corpus, packing, loading.

The unit is the `Problem`, with a signature that decides its split. Sources yield problems of one
split; the corpus yields documents for pre-training; packing and loading turn examples into batches.
"""
