"""The directory of a run: its state, lock, progress and changes; sweeps. Nothing here imports torch."""
