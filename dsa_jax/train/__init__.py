"""Training: stages, loss, optimizer, the jitted step and the loop around it."""
