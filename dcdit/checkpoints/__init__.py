"""Checkpoint files read safely: a trained network from its file, and weights of the reference implementation."""
