"""The GPU check on a CPU, with `import ray` failing as it will on the machine with the GPU."""

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# Imports every module outside `orchestration`, and the parts of the check.
IMPORTS = """
import importlib, pkgutil, sys
sys.path[:0] = sys.argv[1:]
import orpo_ray
above = ("orpo_ray.orchestration", "orpo_ray.cli")
for module in pkgutil.walk_packages(orpo_ray.__path__, "orpo_ray."):
    if not module.name.startswith(above):
        importlib.import_module(module.name)
for part in ("attention", "environment", "memory", "resume", "smoke", "speed", "throughput"):
    importlib.import_module(part)
assert "ray" not in sys.modules
"""


@pytest.mark.long
def test_everything_below_orchestration_is_imported_without_ray(tmp_path):
    (tmp_path / "ray.py").write_text("raise ModuleNotFoundError('there is no Ray here')\n")
    paths = [str(tmp_path), str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gpu")]
    subprocess.run(
        [sys.executable, "-c", IMPORTS, *paths],
        cwd=ROOT,
        env=os.environ | {"OUT": str(tmp_path), "DRY_RUN": "1"},
        check=True,
        timeout=120,
    )


@pytest.mark.long
def test_three_steps_without_ray(tmp_path):
    """One part of the dry run: settings give the losses of fp32, a checkpoint its bytes."""
    command = ["bash", "benchmarks/gpu/check.sh", "first", "--dry-run", "--only", "smoke"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"OUT": str(tmp_path), "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    lines = [json.loads(text) for text in (tmp_path / "results.jsonl").read_text().splitlines()]
    differences = {line["setting"]: line["difference"] for line in lines if "difference" in line}
    assert set(differences) >= {"{}", "{'gradient_checkpointing': True}", "{'lora_r': 8}"}
    assert differences["{'gradient_checkpointing': True}"] < 1e-6
    assert max(differences.values()) < 2e-2  # LoRA trains other weights
    checkpoints = [line for line in lines if line.get("setting", "").startswith("checkpoint")]
    assert len(checkpoints) >= 2  # of AdamW and of Adafactor
    assert all(line["bytes_equal"] for line in checkpoints)
    assert not [line for line in lines if "error" in line]


def test_the_pairs_of_a_file_are_read_as_texts(tmp_path, monkeypatch):
    """Dialogues as of hh-rlhf, and rows that are refused, which no side of a comparison gets."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from workload import pair_texts

    row = {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"}
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(row) + "\n" + json.dumps({"prompt": "only"}) + "\n")
    (text,) = pair_texts(str(file))
    assert (text.chosen.strip(), text.rejected.strip()) == ("b", "c")
    assert text.prompt.endswith("Assistant:")
