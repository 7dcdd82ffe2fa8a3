"""KL divergence between the attention distribution and the indexer's softmax."""
