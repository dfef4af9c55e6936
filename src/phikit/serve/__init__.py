"""Level 7: serving. HTTP as OpenAI's and Ollama's clients speak it, over `generate` and `chat`."""
