"""Checkpoints as one thing: run directories and Hugging Face directories."""
