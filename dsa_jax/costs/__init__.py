"""FLOPs, bytes and dollars of a model, from formulas and from measured ops."""
