"""Train the classifier whose features compare images of digits: ``python scripts/train_digit_features.py``.

The script writes ``dcdit/evaluation/digits.safetensors`` (124 kB). The classifier learns from the digits of the
training split alone, at 8 to 16 pixels, shifted and scaled a little. The script prints how many of the other digits it
reads. A minute on two cores.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

import dcdit
from dcdit.data.autoencoder import to_uint8
from dcdit.data.builtin import Digits as Source
from dcdit.evaluation.features import DigitsClassifier

SIDES = (8, 10, 12, 14, 16)
STEPS, BATCH = 3000, 128


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Shift and scale images by up to a tenth, at random: (B, 1, side, side) uint8 to the same."""
    draws = torch.rand(len(images), 3, generator=generator) * 0.2 - 0.1
    transform = torch.zeros(len(images), 2, 3)
    transform[:, 0, 0] = transform[:, 1, 1] = 1 + draws[:, 0]
    transform[:, :, 2] = 2 * draws[:, 1:]
    grid = F.affine_grid(transform, list(images.shape), align_corners=False)
    # Pixels from outside the image become 0, which is the white of the paper.
    return F.grid_sample(images.float(), grid, align_corners=False).round().to(torch.uint8)


def main() -> None:
    """Train the classifier, print its accuracy, and write its weights."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    source = Source()
    order = np.random.default_rng(0).permutation(1797)  # as the source splits them
    unseen, seen = order[: source.validation], order[source.validation :]
    digits = {side: to_uint8(Source(grid=side).images()[0]) for side in SIDES}
    labels = source.images()[1]
    network = DigitsClassifier(trained=False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    for step in range(STEPS):
        rows = seen[torch.randint(len(seen), (BATCH,), generator=generator).numpy()]
        images = augmented(digits[SIDES[step % len(SIDES)]][rows], generator)
        logits = network.classifier(network.see(images.expand(-1, 3, -1, -1)).features)
        loss = F.cross_entropy(logits, labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    network.frozen()
    for side in SIDES:
        guesses = network.classifier(network(digits[side][unseen]).features).argmax(dim=1)
        print(f"{side} x {side}: {(guesses == labels[unseen]).float().mean():.1%} of {len(unseen)} unseen digits read")
    path = Path(dcdit.__file__).parent / "evaluation" / "digits.safetensors"
    save_file(network.state_dict(), path)
    print(f"{path.stat().st_size / 1000:.0f} kB: {path}")


if __name__ == "__main__":
    main()
