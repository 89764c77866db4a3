"""The whole product against TRL 1.16's ORPOTrainer: same weights, pairs and order, in fp32."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.reference.trl_case import (
    BATCH,
    DATA,
    MAX_LENGTH,
    N_STEPS,
    STORED,
    digest,
    probes,
    run_trl,
    write_case,
)

pytestmark = pytest.mark.timeout(600)
METRICS = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "log_odds_chosen",
    "log_odds_ratio",
    "nll_loss",
    "logps/chosen",
    "logps/rejected",
)


@pytest.fixture(scope="module")
def trained(shared_data, run_here, ray_cluster, tmp_path_factory) -> Path:
    """A folder with the case, on which `jobs/train.py` has trained."""
    folder = tmp_path_factory.mktemp("parity")
    write_case(shared_data / DATA, folder)
    done = run_here(
        folder,
        "jobs/train.py",
        "train_files=pairs.jsonl",
        f"model_name_or_path={folder / 'model'}",
        f"max_steps={N_STEPS}",
        f"per_device_train_batch_size={BATCH}",
        f"max_length={MAX_LENGTH}",
        "max_tokens_per_microbatch=1500",
        "learning_rate=1e-3",
        "logging_steps=1",
        "shuffle=false",
        "bf16=false",
        "run_name=parity",
    )
    assert done.returncode == 0, done.stderr
    return folder


def assert_same_trajectory(folder: Path, theirs: list[dict[str, float]]) -> None:
    """Loss and metrics of every step within 1e-4 of TRL's."""
    lines = (folder / "runs" / "parity" / "metrics.jsonl").read_text().splitlines()
    ours = [json.loads(line) for line in lines]
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for our, their in zip(ours, theirs, strict=True):
        for name in METRICS:
            assert our[name] == pytest.approx(their[name], abs=1e-4), name
        assert our["grad_norm"] == pytest.approx(their["grad_norm"], rel=1e-3)
        assert our["learning_rate"] == pytest.approx(their["learning_rate"])


def test_sixteen_steps_equal_those_that_trl_took(trained):
    """As `make oracle` stored them, with 32 weights of every tensor, which are within 1e-5."""
    stored = json.loads(STORED.read_text())
    assert digest(trained) == stored["digest"], "the case has changed: make oracle"
    assert_same_trajectory(trained, stored["steps"])
    found = probes(trained / "runs" / "parity" / "final" / "model.safetensors")
    assert found.keys() == stored["weights"].keys()
    for name, values in stored["weights"].items():
        assert found[name] == pytest.approx(values, abs=1e-5, rel=0), name


@pytest.mark.slow
def test_sixteen_steps_equal_trl(trained):
    """The same beside TRL itself, with all weights."""
    assert_same_trajectory(trained, run_trl(trained))
    ours = load_file(trained / "runs" / "parity" / "final" / "model.safetensors")
    theirs = load_file(trained / "trl" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert max((ours[name] - theirs[name]).abs().max().item() for name in ours) < 1e-5
