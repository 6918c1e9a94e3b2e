"""A feature network of a few numbers that has all that metrics ask for."""

import numpy as np
import torch


class Corners(torch.nn.Module):
    """Four pixels as features, mean colours as logits, three pixels as spatial features."""

    def forward(self, images):
        pixels = images.float() / 255
        spatial = torch.stack([pixels[:, 0, 3, 3], pixels[:, 0, 4, 3], pixels[:, 0, 3, 4]], dim=1)
        return pixels[:, 0, 2:4, 2:4].flatten(1), 4 * pixels[:, 0, :3, 0], spatial


CORNERS = ("features=own", "features.module._target_=support.features.Corners", "features.size=8")


def archive_arrays(width=4, spatial=3, seed=0):
    """Means and covariances as an archive of the ADM suite has them, by its names."""
    random, found = np.random.default_rng(seed), {}
    for suffix, size in (("", width), ("_s", spatial)):
        root = random.standard_normal((size, size)) / 4
        found |= {f"mu{suffix}": random.random(size), f"sigma{suffix}": root @ root.T + 0.05 * np.eye(size)}
    return found
