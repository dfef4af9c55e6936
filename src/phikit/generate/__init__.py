"""Level 4: generation. The engine works on token ids; `language_model` puts text around it."""
