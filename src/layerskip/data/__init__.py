"""Readers of rows, prompts and texts, shared by training, bench, tune and the commands."""
