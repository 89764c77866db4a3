"""Runs with the other objectives, on real gloo processes: what they learn, and how they resume."""

import shutil

import pytest

from tests.reference.small_run import metrics_without_times, train_small

SETTINGS = {
    "simpo": {"objective": "simpo", "beta": 2.0, "simpo_gamma": 1.0, "cpo_alpha": 0.0},
    "cpo": {"objective": "cpo", "beta": 0.5, "label_smoothing": 0.1},
    "sft": {"objective": "sft"},
}
FEW = {"max_steps": 12, "save_steps": 5, "eval_steps": 6}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_killed_run_ends_byte_identical(run_ranks, inputs, tmp_path, name):
    """As it lay on disk some time after step 5."""
    whole, cut, changes = tmp_path / "whole", tmp_path / "cut", FEW | SETTINGS[name]
    run_ranks(2, train_small, inputs, whole, changes)
    shutil.copytree(whole, cut)
    for gone in (cut / "final", *(cut / "checkpoints").glob("step-0000001*")):
        shutil.rmtree(gone)
    run_ranks(2, train_small, inputs, cut, changes)
    assert "resumed at step 5 of 12" in (cut / "run.log").read_text()
    model = "final/model.safetensors"
    assert (cut / model).read_bytes() == (whole / model).read_bytes()
    lines = metrics_without_times(whole)
    assert metrics_without_times(cut) == lines
    first, last = lines[0], lines[-1]
    assert last["eval_loss"] < first["eval_loss"]
    if name == "sft":
        assert "rewards/accuracies" not in last
        assert last["loss"] == last["nll_loss"]
        assert not (whole / "margins.jsonl").exists()
        assert 0 <= last["eval_rewards/accuracies"] <= 1
    else:
        assert last["eval_log_odds_chosen"] > first["eval_log_odds_chosen"]
        assert (whole / "margins.jsonl").read_text().count("\n") == 12


def test_a_run_does_not_go_on_with_another_objective(run_ranks, inputs, tmp_path):
    changes = FEW | {"max_steps": 5}
    run_ranks(1, train_small, inputs, tmp_path / "run", changes)
    with pytest.raises(Exception, match='objective: "orpo" in the checkpoint, "simpo" now'):
        run_ranks(1, train_small, inputs, tmp_path / "run", changes | {"objective": "simpo"})
