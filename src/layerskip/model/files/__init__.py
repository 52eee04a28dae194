"""A checkpoint's files: found by name, read as tensors, tokenizer and settings, and written whole."""
