"""The requirements of `make test-newest`: those of pyproject.toml without their upper bounds.

`python tests/newest.py` prints them for pip. With `--outside` it names the installed packages whose
versions the ranges of pyproject.toml exclude, or constraints.txt has older ones of: what a failing
test is about.
"""

import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent
# A newer one is a download of gigabytes, and is tested by raising its pin.
PINNED = "torch"


def requirements() -> list[Requirement]:
    """What the project and its tests need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = project["dependencies"] + project["optional-dependencies"]["test"]
    return [Requirement(text) for text in texts]


def pins() -> dict[str, str]:
    """The versions of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.lower().split("==") for line in lines if "==" in line)


def without_upper_bound(requirement: Requirement) -> str:
    """The requirement with its lower bound alone; that of torch at its pin."""
    kept = [s for s in requirement.specifier if s.operator in (">=", ">")]
    if requirement.name == PINNED:
        return f"{PINNED}=={pins()[PINNED]}"
    requirement.specifier = SpecifierSet(",".join(map(str, kept)))
    return str(requirement)


def outside() -> list[str]:
    """A line for each direct requirement that is installed in another version than tested."""
    lines, tested = [], pins()
    for requirement in requirements():
        found = version(requirement.name)
        if not requirement.specifier.contains(found, prereleases=True):
            lines.append(f"{requirement.name} {found}: excluded by {requirement.specifier}")
        elif tested.get(requirement.name.lower(), found) != found.partition("+")[0]:
            lines.append(
                f"{requirement.name} {found}: tested is {tested[requirement.name.lower()]}"
            )
    return lines


if __name__ == "__main__":
    if "--outside" in sys.argv:
        print("\n".join(outside()) or "every package is the tested one")
    else:
        print("\n".join(map(without_upper_bound, requirements())))
