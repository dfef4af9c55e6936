"""One training loop and the objectives that run in it."""
