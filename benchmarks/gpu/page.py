"""The page that measurements are written to: whole at any moment, whatever ends the run."""

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

ABOUT = """
import json, torch
found = {"torch": torch.__version__, "CUDA": torch.version.cuda or "none", "GPU": "none"}
if torch.cuda.is_available():
    about = torch.cuda.get_device_properties(0)
    found["GPU"] = f"{about.name}, {about.total_memory / 2**30:.1f} GiB, {about.multi_processor_count} multiprocessors"
    found["cuDNN"] = str(torch.backends.cudnn.version())
print(json.dumps(found))
"""


def first_line(*command: str, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """The first line that a command prints; "unknown" if there is none."""
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, cwd=cwd, env=env)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return next(iter(ended.stdout.strip().splitlines()), "unknown")


def commit_of(root: Path) -> str:
    """The commit of a checkout, or of the one that was packed."""
    packed = root / ".gpu" / "commit"
    found = first_line("git", "rev-parse", "HEAD", cwd=root)
    return packed.read_text().strip() if found == "unknown" and packed.is_file() else found


def processor() -> str:
    """The name of the CPU, as Linux has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def about_machine(root: Path, environment: dict[str, str]) -> dict[str, str]:
    """Names and versions, asked of another process: this one needs no torch."""
    said = first_line(sys.executable, "-c", ABOUT, env=environment)
    found: dict[str, str] = {"torch": "does not import"} if said == "unknown" else json.loads(said)
    if found.get("GPU", "none") != "none":
        found["driver"] = first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        **found,
        "Python": platform.python_version(),
        "CPU": f"{processor()}, {cores} cores",
        "date": time.strftime("%Y-%m-%d %H:%M %Z"),
        "commit": commit_of(root),
    }


@dataclass
class Entry:
    """A stage on the page.

    Attributes:
        name, about: of the stage.
        state: ``waits``, ``runs``, ``finished``, ``failed``, ``ended at its limit`` or ``no time left``.
        seconds: that it took.
        note: what the GPU was busy with.
        body: file with what it printed.
    """

    name: str
    about: str
    body: Path
    state: str = "waits"
    seconds: float = 0.0
    note: str = ""


@dataclass
class Page:
    """Measurements as Markdown, and how stages ended as JSON beside it.

    Attributes:
        path: of the page.
        title: its heading.
        about: names and versions.
        entries: stages, in their order.
    """

    path: Path
    title: str
    about: dict[str, str] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)

    def write(self) -> None:
        """Put the page as it is now in place of the one before, at once."""
        lines = [f"# {self.title}", "", "| | |", "| --- | --- |"]
        lines += [f"| {key} | {value} |" for key, value in self.about.items()]
        lines += ["", "| stage | | state | seconds |", "| --- | --- | --- | ---: |"]
        lines += [f"| {entry.name} | {entry.about} | {entry.state} | {entry.seconds:.0f} |" for entry in self.entries]
        for entry in self.entries:
            if entry.body.is_file():
                lines += ["", f"## {entry.name}", "", closed(entry.body.read_text(errors="replace")).strip()]
                lines += ["", f"{entry.state}, {entry.seconds:.1f} s. {entry.note}".strip()]
        replace_file(self.path, "\n".join(lines) + "\n")
        states = {entry.name: {"state": entry.state, "seconds": round(entry.seconds, 1)} for entry in self.entries}
        replace_file(self.path.with_suffix(".json"), json.dumps(states, indent=1) + "\n")


def closed(text: str) -> str:
    """``text`` with its last fence closed, as that of a command that still runs, or was ended."""
    fences = sum(line.startswith("```") for line in text.splitlines())
    return text.rstrip("\n") + "\n```" if fences % 2 else text


def replace_file(path: Path, text: str) -> None:
    """Write a file so that it is whole at any moment."""
    part = path.with_name(f".{path.name}.part")
    part.write_text(text)
    part.replace(path)


class Watch:
    """What the GPU is busy with, once a second, as ``nvidia-smi`` says; nothing where there is none."""

    QUERY = "utilization.gpu,memory.used,clocks.sm,power.draw,temperature.gpu"

    def __init__(self, log: Path) -> None:
        self.log, self.process = log, None
        command = ["nvidia-smi", f"--query-gpu={self.QUERY}", "--format=csv,noheader,nounits", "-lms", "1000"]
        try:
            with log.open("w") as file:
                self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.DEVNULL)
        except OSError:
            log.write_text("")

    def lines(self) -> list[str]:
        """All that was said so far."""
        return self.log.read_text().splitlines()

    def summary(self, since: int) -> str:
        """Of the seconds from line ``since`` on."""
        rows = []
        for line in self.lines()[since:]:
            try:
                rows.append([float(number) for number in line.split(",")])
            except ValueError:  # "[N/A]", or a line that is not finished
                continue
        busy = [row for row in rows if len(row) == 5 and row[0] > 50]
        if not busy:
            return ""
        clock = sum(row[2] for row in busy) / len(busy)
        memory, power, heat = (max(row[column] for row in busy) for column in (1, 3, 4))
        return (
            f"GPU busy in {len(busy)} of {len(rows)} s, at {clock:.0f} MHz; at most {memory:,.0f} MiB, {power:.0f} W,"
            f" {heat:.0f} °C."
        )

    def close(self) -> None:
        """Stop."""
        if self.process is not None:
            self.process.terminate()
            self.process.wait()
