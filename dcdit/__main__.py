"""``dcdit <command> ...``, the same as ``python -m dcdit.<command> ...``."""

import os
import runpy
import sys

from dcdit.runtime.terminal import install

COMMANDS = {
    "train": "train or resume a run, or a sweep of runs",
    "sample": "samples of a few classes as pictures, and the router's boundaries",
    "generate": "many images in one file, for evaluation",
    "evaluate": "FID, precision and more at several budgets and guidance scales",
    "score": "the same figures of images that exist, of any program",
    "report": "quality against compute on one page",
    "explore": "move a budget in the browser and see what it does",
    "status": "how far runs are",
    "flops": "what a network costs",
    "ema": "EMA weights of any length after training",
    "export": "hand a trained network on: a folder, the hub, or the reference implementation",
    "extract": "images to latent shards",
    "inspect_latents": "what is in a directory of latent shards",
}


def main() -> None:
    """Run the command that the first word names; without one, list them."""
    install()
    words = sys.argv[1:]
    name = words[0].replace("-", "_") if words else ""
    if name not in COMMANDS:
        if name == "__version":
            from dcdit import __version__

            print(f"dcdit {__version__}")
            return
        asked = name in ("", "__help", "_h")
        print("usage: dcdit <command> [group=choice] [key=value] ...    (dcdit <command> --help)\n")
        for command, what in COMMANDS.items():
            print(f"  {command:16} {what}")
        if not asked:
            print(f"\n{words[0]!r} is none of them", file=sys.stderr)
        sys.exit(0 if asked else 2)
    sys.argv = [sys.argv[0], *words[1:]]
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # where `python -m` looks for your own modules too
    # As `python -m` runs it, so that whatever starts more processes of the command finds its module.
    runpy.run_module(f"dcdit.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
