"""What is measured on a GPU: stages of commands, in the order of their value, each with a limit in seconds.

At a rehearsal the same commands run on a CPU at sizes of seconds.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Place:
    """Where stages run.

    Attributes:
        rehearsal: on a CPU, at sizes of seconds.
        scratch: folder for runs and data.
    """

    rehearsal: bool
    scratch: Path

    @property
    def device(self) -> str:
        """For ``--device``."""
        return "cpu" if self.rehearsal else "cuda"


@dataclass(frozen=True)
class Command:
    """Words for Python.

    Attributes:
        words: the command.
        markdown: whether it prints Markdown; other output is fenced.
        otherwise: the words that are tried if it fails, such as half the batch.
    """

    words: tuple[str, ...]
    markdown: bool = True
    otherwise: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Stage:
    """One part of the measurements.

    Attributes:
        name: for the command line and as a heading.
        about: what it measures.
        takes: seconds that it should take on an H100; most are estimates.
        limit: seconds after which it is ended.
        commands: of a place.
        files: what to keep beside the page, relative to the scratch folder.
        apart: from an earlier stage only by numbers, so that a rehearsal leaves it out.
    """

    name: str
    about: str
    takes: int
    limit: int
    commands: Callable[[Place], list[Command]]
    files: tuple[str, ...] = field(default=())
    apart: bool = False


def tests(place: Place) -> list[Command]:
    """Those marked ``gpu``, which are skipped without one, then what a GPU computes beside what the CPU does."""
    size = ("--scale", "tiny", "--batch", "2", "--count", "2") if place.rehearsal else ("--scale", "b", "--batch", "8")
    marked = ("tests/test_gpu.py", "tests/network/test_attention.py")
    return [
        Command(("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu and not slow", *marked), markdown=False),
        Command(("benchmarks/gpu/checks.py", "--device", place.device, *size)),
    ]


def attention(place: Place) -> list[Command]:
    """Every form of attention."""

    def command(scale: str, batch: int, grid: int, precision: str, rounds: int, warmup: int) -> Command:
        words = ["benchmarks/attention.py", "--device", place.device, "--scale", scale, "--batch", str(batch)]
        words += ["--grid", str(grid), "--precision", precision, "--rounds", str(rounds), "--warmup", str(warmup)]
        return Command(tuple(words))

    if place.rehearsal:
        return [command("tiny", 2, 16, "fp32", 1, 1)]
    sizes = (("b", 128, 32), ("xl", 64, 32), ("xl", 64, 64))
    return [command(*size, "bf16", 9, 3) for size in sizes]


def step(scale: str, batch: int, *more: str) -> Callable[[Place], list[Command]]:
    """Where the time of a step goes; half the batch if that does not fit."""

    def commands(place: Place) -> list[Command]:
        words = ["benchmarks/step.py", "--device", place.device, *more]
        if place.rehearsal:
            words = [word for word in words if word != "--compile"]  # a minute
            words += ["--scale", "tiny", "--grid", "16", "--batch", "1", "--rounds", "1", "--warmup", "0"]
            return [Command(tuple(words))]
        words += ["--scale", scale, "--precision", "bf16", "--rounds", "9", "--warmup", "3", "--batch"]
        return [Command((*words, str(batch)), otherwise=(*words, str(batch // 2)))]

    return commands


def training(compiled: bool) -> Callable[[Place], list[Command]]:
    """``dcdit.train`` on synthetic latents: as it begins, then with a quarter kept, which is what a step costs."""

    def commands(place: Place) -> list[Command]:
        common = ("benchmarks/gpu/training.py", f"data.directory={place.scratch / 'latents'}", "experiment=xl_n4")
        first, steady = (f"run_dir={place.scratch / name}_{compiled}" for name in ("train_first", "train_steady"))
        if place.rehearsal:
            small = ("trainer=cpu", "trainer.log_every_n_steps=1", "data.num_workers=0")
            size = ("model.width=256", "model.depth=2", "model.heads=4", "model.grid=16", "data.batch_size=2")
            return [Command((*common, *small, *size, steady, "trainer.max_steps=2", "--steady"))]
        # without a capacity a fresh XL asks for over 71 GiB with 32 samples at once
        real = (*common, "trainer=gpu", "data.num_workers=4", "data.batch_size=32", "execution.capacity=auto")
        overrides = (*real, f"execution.compile={compiled}")
        begun = [] if compiled else [Command((*overrides, first, "trainer.max_steps=30"))]
        return [*begun, Command((*overrides, steady, "trainer.max_steps=50", "--steady"))]

    return commands


def router(place: Place) -> list[Command]:
    """What its exact convolutions cost, in each memory format, and in TF32."""
    size = ("--batch", "1", "--rounds", "1") if place.rehearsal else ("--batch", "128", "--rounds", "9")
    return [Command(("benchmarks/router.py", "--device", place.device, *size))]


def budget(place: Place) -> list[Command]:
    """Whether smaller budgets are cheaper in time."""

    def command(model: str, batch: int, precision: str, steps: int, rounds: int) -> Command:
        words = ["benchmarks/budget.py", "--device", place.device, "--model", model, "--batch", str(batch)]
        words += ["--precision", precision, "--steps", str(steps), "--rounds", str(rounds)]
        return Command(tuple(words), markdown=False)

    if place.rehearsal:
        return [command("dcdit_digits", 2, "fp32", 2, 1)]
    return [command("dcdit_b", 128, "bf16", 10, 5), command("dcdit_xl", 64, "bf16", 6, 3)]


def sampling(place: Place) -> list[Command]:
    """FID against FLOPs and time, of the networks of ``networks_digits``, or of the digits that come along."""
    runs = [place.scratch / "networks_digits" / f"DCDiT_{seed}" for seed in range(3)]
    there = all((run / "measured.json").is_file() for run in runs)
    words = ["benchmarks/sampling.py", *(map(str, runs) if there else ["digits"]), "--device", place.device]
    words += ["--out", str(place.scratch / "sampling"), "--count"]
    words += ["10", "--few"] if place.rehearsal else ["200"]
    return [Command(tuple(words), markdown=False)]


def networks(data: str) -> Callable[[Place], list[Command]]:
    """DC-DiT, DiT/2 and an upcycled DC-DiT, for what some steps of DiT/2 cost."""

    def commands(place: Place) -> list[Command]:
        words = ("scripts/compare_networks.py", data, "--out", str(place.scratch / f"networks_{data}"))
        size = ("--steps", "6", "--seeds", "1", "--images", "10", "trainer=cpu", "trainer.log_every_n_steps=1")
        return [Command((*words, *(size if place.rehearsal else ("--steps", "400", "trainer=gpu"))))]

    return commands


def suite(place: Place) -> list[Command]:
    """All tests of the project but those of SLURM."""
    return [Command(("-m", "pytest", "-q", "-n", "auto", "--dist", "loadfile", "-m", "not slurm"), markdown=False)]


FIXED = ("--capacity", "0.3")
KEEP_SAMPLING = ("sampling/sampling.json", "sampling/sampling.png")
STAGES = [
    Stage("tests", "tests for a GPU; what it computes beside what the CPU does", 100, 170, tests),
    Stage("step_b", "where the time of a step goes: DC-DiT-B, batch 128, bf16", 25, 70, step("b", 128)),
    Stage("router", "the router's convolutions: memory formats and TF32", 15, 40, router),
    Stage("step_xl", "as step_b, DC-DiT-XL, batch 64", 35, 90, step("xl", 64), apart=True),
    Stage("budget", "whether smaller budgets are cheaper in time: B and XL", 90, 130, budget),
    Stage("train_xl", "dcdit.train experiment=xl_n4 on synthetic latents", 90, 150, training(False)),
    Stage("step_b_compile", "DC-DiT-B with compiled blocks", 60, 110, step("b", 128, "--compile"), apart=True),
    Stage("graphs_b", "DC-DiT-B in a fixed length, whole, as CUDA graphs", 90, 150, step("b", 128, *FIXED)),
    Stage("sampling", "FID against FLOPs and time, of trained digits", 75, 150, sampling, KEEP_SAMPLING),
]
"""In the order of their value."""
EXTRA = [
    Stage("attention", "every form of attention: B and XL at 256px, XL at 512px", 75, 110, attention),
    Stage("train_xl_compile", "train_xl with compiled blocks", 110, 200, training(True), apart=True),
    Stage("networks_digits", "DC-DiT, DiT/2 and upcycled on digits, three seeds", 170, 300, networks("digits")),
    Stage("networks_mnist", "the same on MNIST", 210, 300, networks("mnist")),
    Stage("step_xl_compile", "DC-DiT-XL with compiled blocks", 70, 120, step("xl", 64, "--compile")),
    Stage("step_b_tf32", "DC-DiT-B with the float32 parts in TF32", 25, 70, step("b", 128, "--tf32")),
    Stage("step_xl_less", "XL with activation checkpointing", 60, 120, step("xl", 64, "--compile", "--checkpointing")),
    Stage("step_xl_512", "XL at 512px, batch 16", 40, 100, step("xl", 16, "--grid", "64")),
    Stage("suite", "all tests of the project", 300, 500, suite),
]
"""These run only if they are named."""
