"""What a GPU machine without package index lacks: packed here as wheels, installed there where they are missing."""

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PYTHON = "3.12"
"""Of the GPU machine."""
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
WANTED = (
    "hydra-core", "omegaconf", "antlr4-python3-runtime", "diffusers", "importlib-metadata", "lazy-importer", "zipp",
    "webdataset", "braceexpand", "torch-fidelity", "mlxtend", "rich", "markdown-it-py", "mdurl", "pytest-xdist",
    "execnet", "hypothesis",
)  # fmt: skip
"""What the stages import, and a machine with torch, Lightning, timm, scikit-learn and pytest may lack. Loggers, the
explorer and submitit are left out."""
SOURCES = ("antlr4-python3-runtime",)
"""Published as source alone; the wheel that is built of it is the same everywhere."""
MOST_MIB = 40


def pins(constraints: str, wanted: tuple[str, ...]) -> list[str]:
    """The lines ``name==version`` of ``constraints`` that hold for :data:`PYTHON`, of the ``wanted`` names."""
    known = {}
    for line in constraints.splitlines():
        if match := re.match(r"([\w.-]+)==([\w.+!-]+)(?:; *python_version *(>=|<) *\"([\d.]+)\")?", line):
            name, pin, sense, bound = match.groups()
            newer = not bound or _number(PYTHON) >= _number(bound)
            if newer == (sense != "<"):
                known[name.lower()] = f"{name}=={pin}"
    missing = [name for name in wanted if name not in known]
    if missing:
        raise SystemExit(f"constraints.txt has no version of {', '.join(missing)} for Python {PYTHON}")
    return [known[name] for name in wanted]


def _number(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


def pack(root: Path) -> int:
    """Fill ``.gpu`` in ``root``; git overlooks it. Returns the exit status."""
    folder = root / ".gpu" / "wheels"
    folder.mkdir(parents=True, exist_ok=True)
    stamp, found = folder / "pins.txt", pins((root / "constraints.txt").read_text(), WANTED)
    if not stamp.is_file() or stamp.read_text().split() != found:
        for old in folder.iterdir():
            old.unlink()
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
        built = [path for path in found if path.startswith(SOURCES)]
        subprocess.run([*pip, "wheel", "--no-deps", "-w", str(folder), *built], check=True)
        there = ["--only-binary=:all:", "--python-version", PYTHON, "--implementation", "cp"]
        there += [word for name in PLATFORMS for word in ("--platform", name)]
        others = [path for path in found if path not in built]
        subprocess.run([*pip, "download", "--no-deps", *there, "-d", str(folder), *others], check=True)
        stamp.write_text("\n".join(found) + "\n")
    changed = subprocess.run(
        ["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True).stdout
    (root / ".gpu" / "commit").write_text(head.strip() + (f" and {len(changed)} changed files\n" if changed else "\n"))
    size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    print(
        f".gpu: {len(found)} packages, {size:.1f} MiB. Copy the tree with .gpu/; there: OUT=results benchmarks/gpu.sh"
    )
    if size > MOST_MIB:
        print(f".gpu is over {MOST_MIB} MiB", file=sys.stderr)
    return int(size > MOST_MIB)


def install(root: Path, site: Path) -> None:
    """Install the packed wheels that are missing here into ``site``, over nothing that is there."""
    wheels = [wheel for wheel in sorted((root / ".gpu" / "wheels").glob("*.whl")) if _missing(wheel.name.split("-")[0])]
    if not wheels or site.is_dir():
        return
    command = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-index", "--no-deps"]
    command += ["--no-compile", "--no-cache-dir", "--root-user-action=ignore", "--target", str(site)]
    result = subprocess.run([*command, *map(str, wheels)], capture_output=True, text=True, check=False)
    print(f"{len(wheels)} packages installed" if not result.returncode else result.stdout + result.stderr, flush=True)


def _missing(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return True
    return False
