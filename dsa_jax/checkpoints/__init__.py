"""Checkpoints: run directories and Hugging Face directories."""
