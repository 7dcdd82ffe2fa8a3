"""Notebooks: each NAME.py is the source, NAME.ipynb the same cells with their outputs (`make notebooks`)."""
