"""Generation on token ids: requests in, completions out. This room knows nothing of text."""
