"""The diffusion process: schedule, loss, guidance and sampling. Takes predictions and callables, never a model."""
