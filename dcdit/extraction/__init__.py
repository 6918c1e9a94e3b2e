"""From images to latent shards, restartable at any moment."""
