"""Level 1: the one place that turns words into tokens and back: messages, tokenizers, renderers."""
