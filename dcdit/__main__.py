"""``dcdit <command> ...``, the same as ``python -m dcdit.<command> ...``."""

import difflib
import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

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


def completion(shells: Sequence[str]) -> str:
    """The script that has a shell complete the words of ``dcdit``; exits with a message for another shell than bash."""
    if list(shells) != ["bash"]:
        print('dcdit completion knows bash alone: eval "$(dcdit completion bash)"', file=sys.stderr)
        sys.exit(2)
    script = Path(__file__).with_name("settings") / "completion.bash"
    return script.read_text().replace("@COMMANDS@", " ".join(COMMANDS))


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
        if name == "completion":
            print(completion(words[1:]))
            return
        asked = name in ("", "__help", "_h")
        print("usage: dcdit <command> [group=choice] [key=value] ...    (dcdit <command> --help)\n")
        for command, what in COMMANDS.items():
            print(f"  {command:16} {what}")
        print('\neval "$(dcdit completion bash)" completes commands, groups and keys with the tab key')
        if not asked:
            close = difflib.get_close_matches(name, COMMANDS, n=1)
            meant = f", did you mean {close[0]}?" if close else ""
            print(f"\n{words[0]!r} is none of them{meant}", file=sys.stderr)
        sys.exit(0 if asked else 2)
    sys.argv = [sys.argv[0], *words[1:]]
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())  # where `python -m` looks for your own modules too
    # As `python -m` runs it, so that whatever starts more processes of the command finds its module.
    runpy.run_module(f"dcdit.{name}", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
