"""Train a small encoder of digits for alignment: ``python scripts/train_digits_encoder.py encoder.safetensors``.

The encoder is timm's ``test_vit`` (0.3M parameters, patches of 16 x 16 pixels), which learns to read the digits of the
training split, shifted and scaled a little. It sees them enlarged, with as many patches along a side as ``--grid``
says. The script prints how many of the other digits the encoder reads, and the command that trains with it.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from train_digit_features import augmented

from dcdit.checkpoints.encoder import DIGITS_ENCODER, Encoder, EncoderKeys, load_encoder
from dcdit.data.autoencoder import to_uint8
from dcdit.data.builtin import Digits

PEAK = 3e-3
"""Learning rate after a fifth of the steps."""

KEYS = EncoderKeys("MODEL", "weights", "--grid")


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a .safetensors file, for alignment.weights")
    parser.add_argument("--side", type=int, default=12, help="of the digits in pixels, as the experiment's model.grid")
    parser.add_argument("--grid", type=int, default=6, help="patches along a side, as alignment.grid")
    parser.add_argument("--steps", type=int, default=300)
    return parser.parse_args()


def train(encoder: Encoder, side: int, steps: int) -> float:
    """Train ``encoder`` to read digits of ``side`` pixels; the share of unseen digits that it reads then."""
    generator, source = torch.Generator().manual_seed(0), Digits(grid=side)
    images, labels = source.images()
    order = np.random.default_rng(0).permutation(len(images))  # as the source splits them
    unseen, seen = order[: source.validation], order[source.validation :]
    pixels, classifier = to_uint8(images), torch.nn.Linear(encoder.channels, 10)
    parameters = [*encoder.network.train().requires_grad_(True).parameters(), *classifier.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=PEAK, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK, steps, pct_start=0.2)

    def logits(batch: torch.Tensor) -> torch.Tensor:
        # The mean over the patches: each of them has to know what it sees of the digit.
        return classifier(encoder.features(batch.float() / 255).mean((2, 3)))

    for _ in range(steps):
        rows = seen[torch.randint(len(seen), (64,), generator=generator).numpy()]
        loss = F.cross_entropy(logits(augmented(pixels[rows], generator)), labels[rows], label_smoothing=0.05)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    encoder.network.eval()
    with torch.no_grad():
        return float((logits(pixels[unseen]).argmax(1) == labels[unseen]).float().mean())


def main() -> None:
    """Train the encoder, print what it reads, and write its weights."""
    options = parse()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more would wait for one another: the network is small
    begin = time.perf_counter()
    encoder = load_encoder(DIGITS_ENCODER, "random", options.grid, KEYS)
    with torch.no_grad():  # as large as the patches: with timm's small ones it learns far more slowly where a stroke is
        encoder.network.pos_embed.normal_(std=0.5)
    share = train(encoder, options.side, options.steps)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    save_file(encoder.network.state_dict(), options.out)
    print(f"{share:.1%} of the unseen digits read, after {time.perf_counter() - begin:.0f} s")
    print(
        f"python -m dcdit.train experiment=digits alignment=repa alignment.encoder={DIGITS_ENCODER}"
        f" alignment.weights={options.out} alignment.grid={options.grid}"
    )


if __name__ == "__main__":
    main()
