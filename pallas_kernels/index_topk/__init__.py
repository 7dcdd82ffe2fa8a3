"""Index scores of the lightning indexer and the exact top-k selection over them."""
