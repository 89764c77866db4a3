"""The last lines of a run: means over several steps, intervals, and no early word about labels."""

from pathlib import Path
from typing import Any

import pytest

from orpo_ray.reports.outcome import label_noise_line, outcome_lines
from orpo_ray.runs.files import RunFiles
from orpo_ray.storage.folder import Folder


def trained(step: int, value: float | None, **more: Any) -> dict[str, Any]:
    """A logged step whose metrics all have one value."""
    names = ("loss", "rewards/accuracies", "log_odds_chosen")
    return {"step": step, "epoch": step / 100} | dict.fromkeys(names, value) | more


def evaluated(accuracy: float, log_odds: float, prefix: str = "eval_") -> dict[str, float]:
    """The metrics of an evaluation that are shown at the end."""
    return {f"{prefix}rewards/accuracies": accuracy, f"{prefix}log_odds_chosen": log_odds}


def lines_of(run: Path, *lines: dict[str, Any]) -> list[str]:
    files = RunFiles(Folder.at(run), is_writer=True)
    for line in lines:
        files.metrics(line)
    return outcome_lines(run)


def test_training_is_a_mean_over_the_last_quarter_of_the_steps(tmp_path):
    """Of 20 steps the last five: the line of step 18 begins before them, at step 14."""
    found = lines_of(tmp_path, trained(14, 9.0), trained(18, 5.0), trained(20, 2.0))
    means = "loss 2.0000  accuracy 2.000  log odds 2.0000"
    assert found == [f"training: {means} at step 20 (mean of the last 2 steps)"]


def test_every_line_weighs_as_its_steps_and_a_lost_value_is_left_out(tmp_path):
    """Of 40 steps the last ten: 4 of 1.0, 4 not finite, 2 of 4.0: (4 + 8) / 6 = 2."""
    lines = [trained(step, 50.0) for step in (10, 20, 30)]
    found = lines_of(tmp_path, *lines, trained(34, 1.0), trained(38, None), trained(40, 4.0))
    assert found[0].startswith("training: loss 2.0000 ")
    assert found[0].endswith(" at step 40 (mean of the last 10 steps)")


@pytest.mark.parametrize("steps", [(1,), (1, 2, 3)])
def test_a_single_batch_is_called_one(tmp_path, steps):
    (found,) = lines_of(tmp_path, *(trained(step, 1.0 * step) for step in steps))
    assert found.startswith(f"training: loss {steps[-1]:.4f} ")
    assert found.endswith(f" at step {steps[-1]} (the last batch alone)")


def test_held_out_lines_carry_their_interval(tmp_path):
    """Of the exported model, which is that of step 30; a set without intervals has none."""
    files = RunFiles(Folder.at(tmp_path), is_writer=True)
    files.evaluation(0, "eval_", 97, {"accuracy": (0.5, 0.41, 0.59), "log_odds": (0.01, -0.2, 0.3)})
    files.evaluation(
        30, "eval_", 97, {"accuracy": (0.7, 0.61, 0.79), "log_odds": (1.5, 1.25, 1.75)}
    )
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / "orpo_ray.json").write_text('{"step": 30}')
    hard = "eval_hard_"
    _, *found = lines_of(
        tmp_path,
        {"step": 0, "epoch": 0.0} | evaluated(0.5, 0.01) | evaluated(0.25, -0.5, hard),
        trained(30, 3.0) | evaluated(0.7, 1.5) | evaluated(0.75, 0.5, hard),
        trained(60, 2.0) | evaluated(0.1, 0.1) | evaluated(0.1, 0.1, hard),
    )
    assert found == [
        "held-out accuracy: 0.500 (0.410 to 0.590) before, 0.700 (0.610 to 0.790) after",
        "held-out log odds: +0.010 (-0.200 to +0.300) before, +1.500 (+1.250 to +1.750) after",
        "held-out accuracy (hard): 0.250 before, 0.750 after",
        "held-out log odds (hard): -0.500 before, +0.500 after",
        "in brackets: 95 % confidence intervals, by bootstrap over prompts",
    ]


def test_the_line_about_labels_waits_for_evidence(tmp_path):
    files = RunFiles(Folder.at(tmp_path), is_writer=True)
    files.metrics(trained(5, 1.0))
    assert label_noise_line(tmp_path) == (
        "labels: none can be called wrong, as no rejected answer was computed"
    )
    files.margins(5, [0.1])
    early = label_noise_line(tmp_path)
    assert early.startswith("labels: too early to tell which are wrong: 0.05 passes over the data")
    files.metrics(trained(200, 1.0))
    assert label_noise_line(tmp_path) == (
        "rows that look labelled the wrong way round come first in suspects.jsonl"
    )
