"""From a checkpoint and a budget to images and pictures; the samplers themselves are in ``diffusion``."""
