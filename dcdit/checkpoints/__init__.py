"""Weights in and out: found by name, read safely, told by other programs' names, and handed on."""
