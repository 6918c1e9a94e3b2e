"""Alignment: losses that shape the hidden states of a network beside the diffusion loss."""
