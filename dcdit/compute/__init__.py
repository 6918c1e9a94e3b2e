"""What a forward pass costs in FLOPs, and training lengths at equal compute."""
