"""Early stopping and the best checkpoint: on figures alone, and on real gloo processes."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.runs.files import count_events, exported_step, summary
from orpo_ray.training.checkpoint.evaluations import Evaluations
from orpo_ray.training.errors import EvaluationError
from tests.reference.small_run import metrics_without_times, train_small
from tests.training.test_loop import interrupted_copy, weights_digest

# So high a rate first throws the model off and then lets it come back: the loss rises, then falls,
# by a tenth of a nat an evaluation. Asked for the highest loss, the run has its best in between.
CHANGES: dict[str, Any] = {
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "eval_steps": 2,
    "save_steps": 3,
    "save_total_limit": 3,
    "metric_for_best_model": "loss",
    "greater_is_better": True,
    "load_best_model_at_end": True,
    "early_stopping_patience": 3,
}


@pytest.fixture(scope="module")
def stopped_run(run_ranks, inputs, tmp_path_factory) -> Path:
    """A run of at most 24 steps that stops early, never interrupted."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    run_ranks(2, train_small, inputs, run, CHANGES)
    return run


def best_and_stop(run: Path) -> tuple[int, int]:
    """By the rule alone, from what was logged: the best step, and where patience was out."""
    best, waited = (0, -math.inf), 0
    for line in metrics_without_times(run):
        if line["step"] == 0 or "eval_loss" not in line:
            continue
        waited += 1
        if line["eval_loss"] > best[1]:
            best, waited = (line["step"], line["eval_loss"]), 0
        if waited == 3:
            return best[0], line["step"]
    raise AssertionError("patience was never out")


def test_training_stops_where_patience_is_out_and_ends_as_usual(stopped_run):
    best, stop = best_and_stop(stopped_run)
    assert 0 < best < stop < 24
    last = metrics_without_times(stopped_run)[-1]
    assert last["step"] == stop
    assert {"loss", "eval_loss", "learning_rate"} <= last.keys()
    log = (stopped_run / "run.log").read_text()
    assert f"stopped early at step {stop}: 3 evaluations in a row were no better than " in log
    assert f"final/ is the model of step {best}, the best of {stop // 2} evaluations" in log
    assert count_events(stopped_run) == {}
    assert summary(stopped_run)["after"]["step"] == best


def test_the_best_checkpoint_was_saved_at_once_and_is_kept(stopped_run):
    """It is not due by save_steps, and the newest three of all that were saved are others."""
    best, stop = best_and_stop(stopped_run)
    saved = sorted({*range(3, stop + 1, 3), best, stop})
    assert best % 3
    assert best not in saved[-3:]
    names = sorted(path.name for path in (stopped_run / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (best, *saved[-2:])]


def test_the_exported_model_is_that_of_the_best_step(run_ranks, stopped_run, inputs, tmp_path):
    """At a constant rate a run of so many steps is the beginning of a longer one."""
    best, _ = best_and_stop(stopped_run)
    changes = {"learning_rate": 0.1, "lr_scheduler_type": "constant", "max_steps": best}
    run_ranks(2, train_small, inputs, tmp_path / "run", changes)
    assert weights_digest(stopped_run) == weights_digest(tmp_path / "run")
    assert exported_step(stopped_run / "final") == best


def test_a_killed_run_stops_at_the_same_step_with_the_same_bytes(
    run_ranks, stopped_run, inputs, tmp_path
):
    """Killed when two of the three evaluations without a better one lay behind its checkpoint."""
    best, stop = best_and_stop(stopped_run)
    run = interrupted_copy(stopped_run, tmp_path / "run", last_step=stop - 1)
    run_ranks(2, train_small, inputs, run, CHANGES, new_processes=True)
    assert weights_digest(run) == weights_digest(stopped_run)
    assert metrics_without_times(run) == metrics_without_times(stopped_run)
    assert (run / "ledger.jsonl").read_text() == (stopped_run / "ledger.jsonl").read_text()
    resumed_at = max(step for step in range(stop) if step % 3 == 0)
    assert resumed_at - best > 4
    assert f"resumed at step {resumed_at} of 24" in (run / "run.log").read_text()


def test_a_stopped_run_that_is_started_again_stops_at_once(
    run_ranks, stopped_run, inputs, tmp_path
):
    _, stop = best_and_stop(stopped_run)
    run = tmp_path / "run"
    shutil.copytree(stopped_run, run)
    before = {path: path.stat().st_mtime_ns for path in (run / "final").iterdir()}
    run_ranks(2, train_small, inputs, run, CHANGES | {"max_steps": 48})
    assert {path: path.stat().st_mtime_ns for path in (run / "final").iterdir()} == before
    assert metrics_without_times(run) == metrics_without_times(stopped_run)
    assert f"resumed at step {stop} of {stop}" in (run / "run.log").read_text()


def test_where_the_best_checkpoint_is_lost_the_best_of_the_others_is_exported(
    run_ranks, stopped_run, inputs, tmp_path
):
    """All other evaluated steps but the last have lost theirs to save_total_limit."""
    best, stop = best_and_stop(stopped_run)
    run = interrupted_copy(stopped_run, tmp_path / "run", last_step=stop)
    shard = run / "checkpoints" / f"step-{best:08d}" / "__0_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    run_ranks(2, train_small, inputs, run, CHANGES)
    assert exported_step(run / "final") == stop
    assert count_events(run) == {"best_checkpoints_lost": 1}
    log = (run / "run.log").read_text()
    assert f"step {best}, is lost: __0_0.distcp does not match its checksum" in log
    assert f"final/ is the model of step {stop}" in log


def test_a_metric_that_no_evaluation_has_is_refused_before_training(run_ranks, inputs, tmp_path):
    changes = CHANGES | {"metric_for_best_model": "accuracy"}
    with pytest.raises(AssertionError, match=r"EvaluationError: metric_for_best_model: the eval"):
        run_ranks(1, train_small, inputs, tmp_path / "run", changes, new_processes=True)
    assert not list((tmp_path / "run").iterdir())


def settings(**leaves: Any) -> Any:
    return ORPOConfig(eval_steps=2, **leaves).train


def test_the_metrics_that_there_are_get_named():
    config = settings(load_best_model_at_end=True)
    with pytest.raises(EvaluationError, match=r"have no eval_loss; known are eval_a_loss, .*_b_"):
        Evaluations.from_config(config, ["eval_a_", "eval_b_"])
    with pytest.raises(EvaluationError, match=r"load_best_model_at_end: .* set eval_files or val"):
        Evaluations.from_config(config, [])
    with pytest.raises(EvaluationError, match=r"early_stopping_patience: .* no evaluation data"):
        Evaluations.from_config(settings(early_stopping_patience=1), [])
    Evaluations.from_config(settings(), [])


@pytest.mark.parametrize(
    ("metric", "name", "greater"),
    [
        ("eval_loss", "eval_loss", False),
        ("nll_loss", "eval_nll_loss", False),
        ("rewards/accuracies", "eval_rewards/accuracies", True),
        ("eval_log_odds_chosen", "eval_log_odds_chosen", True),
    ],
)
def test_the_direction_follows_from_the_name(metric, name, greater):
    config = settings(metric_for_best_model=metric, early_stopping_patience=1)
    evaluations = Evaluations.from_config(config, ["eval_"])
    assert (evaluations.metric, evaluations.greater_is_better) == (name, greater)


def test_equal_is_not_better_nor_is_what_is_not_finite_nor_an_untrained_model():
    values = [(0, 9.0), (2, math.nan), (4, 3.0), (6, 3.0), (8, math.inf), (10, 1.0)]
    evaluations = Evaluations("eval_x", True, 3, values=values)
    assert evaluations.ranking == (4, 6, 10)
    assert evaluations.n_without_better == 3
    assert evaluations.patience_is_out
    assert "before training it was better: 9" in evaluations.export_text(4)
    lowest = Evaluations("eval_x", False, 3, values=values)
    assert lowest.ranking == (10, 4, 6)
    assert not lowest.patience_is_out
    assert "before training" not in lowest.export_text(10)
    never = Evaluations("eval_x", False, 2, values=[(0, 1.0), (2, math.nan), (4, math.nan)])
    assert never.patience_is_out
    assert never.stop_text(4).startswith("stopped early at step 4: eval_x was never finite")
