"""Level 3: checkpoints in and out: Hugging Face folders, GGUF files, PEFT adapters."""
