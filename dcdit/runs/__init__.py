"""What a run says of itself in its directory: state, lock, progress, sweeps. No torch."""
