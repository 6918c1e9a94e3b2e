"""Score a digits run: ``python scripts/score_digits.py runs/digits`` after training and sampling.

The script reads the newest checkpoint and the samples that ``dcdit.sample`` wrote beside it, and reports

* the share of samples that a classifier trained on the real digits assigns to the requested class,
* the keep ratio against 1 / compression,
* how often the router keeps positions on or next to ink and on empty background, by timestep.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from digit_trials import Judge
from omegaconf import OmegaConf
from rich.console import Console
from rich.table import Table

from dcdit.checkpoints.load import load_model
from dcdit.checkpoints.read import read_checkpoint
from dcdit.data.builtin import HandwrittenDigits, build_source

TIMESTEPS = (20, 200, 500, 800)
INK = -0.5  # in [-1, 1]; paper white is -1


def class_accuracy(samples: Path, source: HandwrittenDigits) -> dict[str, float]:
    """The share of generated digits read as the requested class, and the classifier's accuracy on unseen real ones."""
    judge = Judge(source)
    with np.load(samples, allow_pickle=False) as stored:
        generated, labels = torch.from_numpy(stored["latents"]), torch.from_numpy(stored["labels"])
    return {
        "generated_digits": len(labels),
        "class_accuracy": judge.share(generated, labels),
        "classifier_accuracy_on_unseen_real_digits": judge.on_unseen,
    }


def router_statistics(checkpoint: str, images: torch.Tensor, labels: torch.Tensor) -> list[dict[str, float]]:
    """The keep ratio of positions on or next to ink and of empty background, for real digits diffused to timestep t."""
    model = load_model(checkpoint)
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    near_ink = F.max_pool2d((images > INK).float(), 3, stride=1, padding=1).flatten(1).bool()
    rows = []
    for timestep in TIMESTEPS:
        t = torch.full((len(images),), timestep)
        with torch.no_grad():
            kept = model.network(model.process.add_noise(images, noise, t), t, labels).routing.natural_mask
        rows.append(
            {
                "t": timestep,
                "kept": float(kept.float().mean()),
                "kept_on_or_next_to_ink": float(kept[near_ink].float().mean()),
                "kept_on_background": float(kept[~near_ink].float().mean()),
            }
        )
    return rows


def main() -> None:
    """Print the scores and write them to ``score.json`` in the run's directory."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="run directory, such as runs/digits")
    run = parser.parse_args().run
    checkpoint, samples = run / "checkpoints" / "last.ckpt", run / "samples" / "latents.npz"
    for path in (checkpoint, samples):
        if not path.is_file():
            parser.error(f"{path} is missing: train and sample first (make train)")
    settings = read_checkpoint(checkpoint)["hyper_parameters"]
    spec = OmegaConf.load(run / "config.yaml").data.source
    source = build_source(spec) if spec else None
    if not isinstance(source, HandwrittenDigits):
        parser.error(f"{run} was not trained on digits (data.source={spec})")
    images, labels = source.images()
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:512]

    score = {
        **class_accuracy(samples, source),
        "one_over_compression": 1 / settings["compression"],
        "router": router_statistics(str(checkpoint), images[chosen], labels[chosen]),
    }
    (run / "score.json").write_text(json.dumps(score, indent=1) + "\n")
    table = Table(title=f"router, keep ratio (asked for {1 / settings['compression']:.2f} on average)")
    for heading in ("t", "all positions", "on or next to ink", "background"):
        table.add_column(heading, justify="right")
    for row in score["router"]:
        table.add_row(*(f"{value:.2f}" if key != "t" else f"{value:.0f}" for key, value in row.items()))
    console = Console()
    console.print(table)
    console.print(
        f"{score['class_accuracy']:.1%} of {score['generated_digits']} generated digits are read as the requested class"
        f" (the same classifier reads {score['classifier_accuracy_on_unseen_real_digits']:.1%} of unseen real digits)"
    )


if __name__ == "__main__":
    main()
