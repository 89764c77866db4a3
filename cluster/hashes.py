"""Writes cluster/requirements.txt: what the image installs, by version and hash.

From what pip says of the versions in constraints.txt, on the image's Python and platform:

    pip install --dry-run --ignore-installed --no-deps --only-binary :all: \
        --report report.json --requirement <(grep -v ^torch== constraints.txt)
    python cluster/hashes.py report.json
"""

import json
import sys
from collections.abc import Iterator
from importlib.metadata import requires
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
TARGET = ROOT / "cluster" / "requirements.txt"
# torch comes by its version from where its builds are, setuptools with the environment.
ELSEWHERE = {"orpo-ray", "setuptools", "torch"}
_HEAD = (
    "# Written by cluster/hashes.py: Python 3.11 on Linux x86-64. torch has an index of its own.\n"
)


def needed(extras: set[str]) -> set[str]:
    """Every package that the project with these extras needs, in this environment."""
    found: set[str] = set()
    waiting: list[tuple[str, set[str]]] = [("orpo-ray", extras)]
    while waiting:
        name, wanted = waiting.pop()
        for inner, inner_extras in _needs(name, wanted):
            if inner not in found or inner_extras:
                waiting.append((inner, inner_extras))
            found.add(inner)
    return found - ELSEWHERE


def _needs(name: str, extras: set[str]) -> Iterator[tuple[str, set[str]]]:
    for line in requires(name) or ():
        requirement = Requirement(line)
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": extra}) for extra in {"", *extras}):
            yield canonicalize_name(requirement.name), requirement.extras


def main(report: str) -> None:
    """Write the file from pip's report."""
    wanted = needed({"lora"})
    lines = {}
    for entry in json.loads(Path(report).read_text())["install"]:
        name = canonicalize_name(entry["metadata"]["name"])
        if name in wanted:
            digest = entry["download_info"]["archive_info"]["hashes"]["sha256"]
            lines[name] = f"{name}=={entry['metadata']['version']} --hash=sha256:{digest}\n"
    if missing := wanted - lines.keys():
        raise SystemExit(f"no hash of {', '.join(sorted(missing))}")
    TARGET.write_text(_HEAD + "".join(lines[name] for name in sorted(lines)))


if __name__ == "__main__":
    main(sys.argv[1])
