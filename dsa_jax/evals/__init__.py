"""Evaluation: what sparse attention costs in quality, against dense attention and against simple selections."""
