"""Give an environment the core dependencies of a package in it, as links to what this Python has installed.

    python scripts/link_core.py dcdit path/of/site-packages

The environment then is what `pip install` makes without an extra, in seconds and without a download: optional packages
are not in it, although this Python may have them.
"""

import sys
from collections.abc import Iterable, Iterator
from importlib.metadata import Distribution, PathDistribution, distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement


def required(package: Distribution, extras: Iterable[str]) -> list[Requirement]:
    """What a package requires in this environment, with these extras of it."""
    requirements = map(Requirement, package.requires or ())
    return [
        requirement
        for requirement in requirements
        if not requirement.marker or any(requirement.marker.evaluate({"extra": e}) for e in extras)
    ]


def dependencies(package: Distribution) -> Iterator[Distribution]:
    """What a package requires, directly or because something else of it does, as installed in this Python."""
    waiting, done = required(package, [""]), set()
    while waiting:
        requirement = waiting.pop()
        if str(requirement) not in done:
            done.add(str(requirement))
            found = distribution(requirement.name)
            waiting += required(found, ["", *requirement.extras])
            yield found


def link(package: Distribution, folder: Path) -> None:
    """Link the files of an installed package in ``folder``: what lies at the top, once for packages that share it."""
    top = {file.parts[0] for file in package.files or () if file.parts[0] not in ("..", "__pycache__")}
    if isinstance(package, PathDistribution):  # what pip installs by setup.py lists its files otherwise
        modules = (package.read_text("top_level.txt") or "").split()
        top |= {package._path.name, *modules, *(f"{module}.py" for module in modules)}  # type: ignore[attr-defined]
    for name in top:
        source, target = Path(str(package.locate_file(name))), folder / name
        if source.exists() and not target.exists():
            target.symlink_to(source)


def main() -> None:
    """Link all dependencies of the package, but not the package itself."""
    name, folder = sys.argv[1:]
    (package,) = distributions(name=name, path=[folder])
    for dependency in dependencies(package):
        link(dependency, Path(folder))


if __name__ == "__main__":
    main()
