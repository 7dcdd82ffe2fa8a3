"""Checkpoints: run directories and Hugging Face directories, read, written, converted and trained on from."""
