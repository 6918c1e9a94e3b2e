"""Weights of networks: resolved by name, read safely, whichever program wrote them, and exported."""
