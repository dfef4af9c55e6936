"""Pictures and speech to learn from, made offline: rendered text, charts, shapes, synthetic voices.

Every problem says what it shows, so its answer is exact. A problem belongs to a split by its
content, and so do the fonts, the voices and the palettes: those of the test set never occur in
training.
"""
