"""Latents on their way to training: shards and manifest, the order of samples, the stream, autoencoders, digits."""
