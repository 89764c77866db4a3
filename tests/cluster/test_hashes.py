"""cluster/requirements.txt: all that the image installs, each by version and hash."""

import re

from packaging.utils import canonicalize_name

from cluster import hashes
from tests.conftest import ROOT


def pinned() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if "==" in line]
    return {canonicalize_name(name): version for name, version in pairs}


def test_the_image_installs_the_tested_versions_by_hash():
    lines = hashes.TARGET.read_text().splitlines()[1:]
    found = {}
    for line in lines:
        match = re.fullmatch(r"([a-z0-9-]+)==(\S+) --hash=sha256:[0-9a-f]{64}", line)
        assert match, line
        found[match[1]] = match[2]
    assert found.keys() == hashes.needed({"lora"})
    assert found.items() <= pinned().items()


def test_nothing_of_the_index_is_installed_without_a_hash():
    text = (ROOT / "cluster" / "Dockerfile").read_text().replace("\\\n", " ")
    for command in re.findall(r"^RUN (pip install .*)$", text, re.MULTILINE):
        assert (
            "--require-hashes" in command or "torch==" in command or command.endswith("'.[lora]'")
        )
        assert "'.[lora]'" not in command or "--no-deps" in command
