"""The catalogue of metrics: one entry is all that charts, gauges and sweeps need of a metric."""

import ast
from pathlib import Path

import pytest

import orpo_ray
from orpo_ray.objective.metrics import N_SUMS, LossWeights, metrics_from_sums
from orpo_ray.objective.objectives import orpo
from orpo_ray.reports.curves import LEARNING, THROUGHPUT
from orpo_ray.runs.metrics import BY_NAME, EVALUATED, METRICS, eval_prefixes, split_eval_key
from tests.conftest import ROOT

PACKAGE = Path(orpo_ray.__file__).parent
# Where names of metrics have to stand: they are computed, selected, or read by what they mean.
NAMED = {"objective/metrics.py", "training/metrics.py", "runs/metrics.py", "config/train.py"}


def test_evaluations_have_what_the_objective_computes():
    """Sums that are not zero have a router loss too."""
    computed = metrics_from_sums([1.0] * N_SUMS, LossWeights(orpo(1.0), router=1.0))
    assert {metric.name for metric in EVALUATED} == computed.keys()


def test_names_are_unique():
    assert len(BY_NAME) == len(METRICS)
    assert len({metric.key for metric in METRICS}) == len(METRICS)


def test_only_losses_are_better_when_lower():
    lower = {metric.name for metric in METRICS if metric.lower_is_better}
    assert lower == {"loss", "nll_loss", "aux_loss"}


@pytest.mark.parametrize(
    ("key", "prefix", "name"),
    [
        ("eval_loss", "eval_", "loss"),
        ("eval_nll_loss", "eval_", "nll_loss"),
        ("eval_my_loss", "eval_my_", "loss"),
        ("eval_held_out_rewards/accuracies", "eval_held_out_", "rewards/accuracies"),
    ],
)
def test_a_key_of_an_evaluation_is_the_prefix_of_a_set_and_a_metric(key, prefix, name):
    assert split_eval_key(key) == (prefix, BY_NAME[name])


@pytest.mark.parametrize("key", ["loss", "eval_", "evaloss", "eval_grad_norm", "eval_accuracy"])
def test_any_other_key_is_none(key):
    assert split_eval_key(key) is None


def test_the_prefixes_in_a_line():
    line = {"loss": 1.0, "eval_rewards/accuracies": 0.5, "eval_a_b_rewards/accuracies": 0.5}
    assert eval_prefixes(line) == ["eval_", "eval_a_b_"]


def test_every_metric_with_a_chart_is_drawn_once_in_the_order_of_the_catalogue():
    for charts, group in ((LEARNING, "learning"), (THROUGHPUT, "throughput")):
        drawn = [name for chart in charts for name in chart.metrics]
        assert drawn == [metric.name for metric in METRICS if metric.chart == group]


def test_the_grafana_board_asks_for_every_gauge():
    board = (ROOT / "cluster" / "grafana-dashboard.json").read_text()
    for metric in METRICS:
        if metric.gauge:
            assert f"ray_orpo_{metric.gauge}{{" in board
            assert f"ray_orpo_eval_{metric.gauge}{{" in board or not metric.is_evaluated


def test_no_module_keeps_a_list_of_metrics_of_its_own():
    """A display, or a table, that names four metrics is a list: three are a choice."""
    names = BY_NAME.keys() - {"loss", "step", "epoch", "time"}
    found = []
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).as_posix() in NAMED:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Dict | ast.List | ast.Tuple | ast.Set):
                parts = [part for part in ast.walk(node) if isinstance(part, ast.Constant)]
                if sum(part.value in names for part in parts) > 3:
                    found.append(f"{path}:{node.lineno}")
    assert not found
