"""Measure dcdit on a GPU in ten minutes, on a machine that may have no network: ``benchmarks/gpu.sh``.

    benchmarks/gpu.sh --pack                  where a package index is: fill .gpu/ with what a bare machine lacks
    OUT=results benchmarks/gpu.sh             on the GPU machine: all stages but the extra ones, within 560 seconds
    benchmarks/gpu.sh --budget 200 step_b     one stage
    benchmarks/gpu.sh --list                  what there is
    benchmarks/gpu.sh --rehearse              the same commands on a CPU at sizes of seconds: whether they run

Writes ``<date>_gpu.md`` to the folder OUT (``benchmarks/results`` if that is not set) while it measures; the page is
whole at any moment. A stage that fails, or takes longer than its limit, does not end the others. Needs Python alone;
stages need torch, and what pyproject.toml asks for. The exit status is 1 if a stage failed.
"""

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pack import install, pack
from page import Entry, Page, Watch, about_machine
from stages import EXTRA, STAGES, Command, Place, Stage

ROOT = Path(__file__).resolve().parents[2]
LEAST = 10
"""Seconds for which no stage starts."""
TAIL = 3000
"""Characters of what a failing command said."""


def environment_of(place: Place, site: Path) -> dict[str, str]:
    """Variables of the commands."""
    folders = [str(ROOT), *([str(site)] if site.is_dir() else []), os.environ.get("PYTHONPATH", "")]
    fixed = {
        "PYTHONPATH": os.pathsep.join(filter(None, folders)),
        "PYTHONUNBUFFERED": "1",
        "COLUMNS": "150",
        "MPLBACKEND": "Agg",
        "HF_HUB_OFFLINE": "1",
        "TORCHINDUCTOR_CACHE_DIR": str(place.scratch / "inductor"),
        "TRITON_CACHE_DIR": str(place.scratch / "triton"),
    }
    if place.rehearsal:  # networks are so small that a second thread only waits
        fixed |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {**os.environ, **fixed}


def call(words: tuple[str, ...], body: Path, said: Path, until: float, page: Page, environment: dict[str, str]) -> int:
    """Run Python with ``words``; its output goes to ``body``, its errors to ``said``, and the page follows.

    Returns:
        Its exit status; 124 if it was ended because it was ``until`` then.
    """
    with body.open("a") as output, said.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=errors,
            start_new_session=True,
        )  # fmt: skip
        try:
            while process.poll() is None and time.monotonic() < until:
                try:
                    process.wait(min(1.0, max(0.05, until - time.monotonic())))
                except subprocess.TimeoutExpired:
                    page.write()
            return 124 if process.poll() is None else process.returncode
        finally:
            end(process)


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a command and what it has started: asked first, and five seconds later by force."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, sign)
        except ProcessLookupError:
            return
        try:
            process.wait(5)
        except subprocess.TimeoutExpired:
            continue


def run_command(command: Command, body: Path, until: float, page: Page, environment: dict[str, str]) -> str:
    """Run one command of a stage; returns how it ended."""
    said, status = body.with_suffix(".err"), 0
    for words in filter(None, (command.words, command.otherwise)):
        begin = time.monotonic()
        with body.open("a") as output:
            output.write(f"\n### `python {' '.join(words)}`\n\n" + ("" if command.markdown else "```\n"))
        status = call(words, body, said, until, page, environment)
        with body.open("a") as output:
            output.write("" if command.markdown else "\n```\n")
            if status:
                tail = said.read_text(errors="replace")[-TAIL:].replace("```", "'''").strip()
                words_of = "ended at the limit" if status == 124 else f"failed with exit status {status}"
                output.write(f"\n**{words_of}**; the end of what it said:\n\n```\n{tail}\n```\n")
            output.write(f"\n({time.monotonic() - begin:.1f} s)\n")
        if status in (0, 124):
            break
    return {0: "finished", 124: "ended at its limit"}.get(status, "failed")


def run_stage(stage: Stage, entry: Entry, limit: float, place: Place, page: Page, environment: dict[str, str]) -> None:
    """Run the commands of a stage, one after the other, within ``limit`` seconds."""
    begin, entry.state = time.monotonic(), "runs"
    states = []
    for command in stage.commands(place):
        if time.monotonic() - begin < limit - 1:
            states.append(run_command(command, entry.body, begin + limit, page, environment))
        else:
            states.append("ended at its limit")
    entry.seconds = time.monotonic() - begin
    entry.state = next((state for state in ("failed", "ended at its limit") if state in states), "finished")
    for name in stage.files:
        kept = place.scratch / name
        if kept.is_file():
            shutil.copy(kept, page.path.with_name(f"{page.path.stem}_{kept.name}"))


def free_name(folder: Path, name: str) -> Path:
    """A page that is not there yet: earlier ones stay."""
    names = (f"{name}.md" if number == 1 else f"{name}_{number}.md" for number in range(1, 1000))
    return next(folder / candidate for candidate in names if not (folder / candidate).exists())


def show_list() -> None:
    """What there is."""
    for title, stages in (("all, in this order:", STAGES), ("only if named:", EXTRA)):
        print(title)
        for stage in stages:
            print(f"  {stage.name:16} about {stage.takes:3} s, at most {stage.limit:3} s  {stage.about}")


def main() -> int:
    """Run the stages that are asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stages", nargs="*", help="all but the extra ones if left out")
    parser.add_argument("--budget", type=float, default=560, help="seconds after which nothing runs any more")
    parser.add_argument("--list", action="store_true", help="list the stages")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, at sizes of seconds")
    parser.add_argument("--pack", action="store_true", help="fill .gpu/ for a machine without package index")
    options = parser.parse_args()
    if options.list:
        show_list()
        return 0
    if options.pack:
        return pack(ROOT)
    known = {stage.name: stage for stage in (*STAGES, *EXTRA)}
    for name in options.stages:
        if name not in known:
            parser.error(f"{name} is no stage: take some of {', '.join(known)}")
    usual = [stage for stage in STAGES if not (options.rehearse and stage.apart)]
    return measure([known[name] for name in options.stages] or usual, options.budget, options.rehearse)


def measure(stages: list[Stage], budget: float, rehearsal: bool) -> int:
    """Run ``stages`` within ``budget`` seconds; returns the exit status."""
    begin = time.monotonic()
    scratch = Path(os.environ.get("SCRATCH") or tempfile.mkdtemp(prefix="dcdit_gpu_")).resolve()
    scratch.mkdir(parents=True, exist_ok=True)
    place, site = Place(rehearsal, scratch), scratch / "site"
    install(ROOT, site)
    environment = environment_of(place, site)
    about = about_machine(ROOT, environment)
    if not rehearsal and about.get("GPU", "none") == "none":
        print("torch sees no GPU here: --rehearse runs the commands on a CPU", file=sys.stderr)
        return 1
    out = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    out.mkdir(parents=True, exist_ok=True)
    title, kind = ("A rehearsal on a CPU", "rehearsal") if rehearsal else ("Measurements on a GPU", "gpu")
    page = Page(free_name(out, f"{time.strftime('%Y-%m-%d')}_{kind}"), title, about)
    page.entries = [Entry(stage.name, stage.about, scratch / f"{stage.name}.md") for stage in stages]
    for entry in page.entries:
        entry.body.unlink(missing_ok=True)
    page.write()
    print(f"{page.path}, within {budget:g} s", flush=True)
    # The command that runs is ended, the page is written.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    watch = Watch(scratch / "watch.csv")
    try:
        for stage, entry in zip(stages, page.entries, strict=True):
            left, since = budget - (time.monotonic() - begin), len(watch.lines())
            if left < LEAST:
                entry.state = "no time left"
                continue
            run_stage(stage, entry, min(stage.limit, left), place, page, environment)
            entry.note = watch.summary(since)
            page.write()
            print(f"{entry.name}: {entry.state}, {entry.seconds:.1f} s", flush=True)
            if entry.state == "failed":
                print(entry.body.read_text(errors="replace")[-TAIL:], file=sys.stderr, flush=True)
    finally:
        watch.close()
        page.write()
        signal.signal(signal.SIGTERM, before)
    print(f"{time.monotonic() - begin:.0f} s in all: {page.path}")
    return int(any(entry.state == "failed" or (rehearsal and entry.state != "finished") for entry in page.entries))


if __name__ == "__main__":
    sys.exit(main())
