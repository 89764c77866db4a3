"""Gauges: what a Prometheus that asks the node gets, and a board that asks for nothing else."""

import json
import os
import re
import time
import urllib.request
from pathlib import Path

import pytest

from orpo_ray.orchestration import gauges
from orpo_ray.runs.manifest import checkpoint_directory, fingerprint, write_manifest
from orpo_ray.storage.folder import Folder
from tests.conftest import ROOT

BOARD = ROOT / "cluster" / "grafana-dashboard.json"
NAMES = {
    *(name for name, _ in (*gauges.TRAINED.values(), *gauges.EVALUATED.values())),
    gauges.CHECKPOINT_AGE[0],
    gauges.REFUSED_ROWS[0],
}
Line = dict[str, float | None]


def line() -> Line:
    """As the loop logs one with two evaluation sets; of one the NLL is not finite any more."""
    learned = {"loss": 2.5, "log_odds_chosen": 0.25, "rewards/accuracies": 0.75}
    trained = {
        "step": 30,
        "pairs_per_s": 12.5,
        "tokens_per_s": 640.0,
        "mfu": 0.5,
        "nll_loss": 2.25,
    } | learned
    easy = {f"eval_easy_{name}": value + 1 for name, value in learned.items()}
    hard = {f"eval_hard_{name}": value + 2 for name, value in learned.items()}
    return trained | easy | hard | {"eval_easy_nll_loss": 1.5, "eval_hard_nll_loss": None}


def served(ray_node: dict[str, object]) -> dict[tuple[str, ...], float]:
    """The project's samples at the node's endpoint: name and our labels, and the value."""
    url = f"http://{ray_node['NodeManagerAddress']}:{ray_node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=5) as answer:
        text = answer.read().decode()
    samples = {}
    for name, labels, value in re.findall(r"^ray_(orpo_\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
        known = dict(re.findall(r'(\w+)="([^"]*)"', labels))
        ours = [known[key] for key in ("run", "set", "data", "reason") if key in known]
        samples[name, *ours] = float(value)
    return samples


@pytest.mark.slow
def test_a_logged_line_is_served_at_the_nodes_endpoint(ray_cluster, tmp_path):
    """The checkpoint was committed 100 s before the line."""
    import ray

    run = tmp_path / "a-run"
    step = checkpoint_directory(run, 20)
    step.mkdir(parents=True)
    (step / "tensors").write_bytes(b"1")
    write_manifest(Folder.at(step), {"step": 20}, {"tensors": fingerprint(step / "tensors")})
    os.utime(step / "MANIFEST.json", (time.time() - 100,) * 2)
    checkpoint_directory(run, 30).mkdir()  # is still being written
    report = {"train": {"rows_read": 9, "refused": {"empty_chosen": 2}}, "eval": {"rows_kept": 1}}
    (run / "data_report.json").write_text(json.dumps(report))

    @ray.remote(num_cpus=1)
    class Rank:
        def show(self, directory: Path, before: Line, shown: Line) -> None:
            self.gauges = gauges.RunGauges(directory)
            self.gauges.show(before)
            self.gauges.show(shown)

    rank = Rank.remote()
    ray.get(rank.show.remote(run, line() | {"loss": 9.0, "eval_hard_nll_loss": 4.0}, line()))
    deadline, samples = time.monotonic() + 15, {}
    while {name for name, *_ in samples} != NAMES and time.monotonic() < deadline:
        time.sleep(0.5)
        samples = served(ray.nodes()[0])
    age = samples.pop(("orpo_checkpoint_age_s", "a-run"))
    assert 100 <= age < 130
    figures = {("loss", 2.5), ("log_odds", 0.25), ("reward_accuracy", 0.75)}
    assert samples == {
        ("orpo_step", "a-run"): 30.0,
        ("orpo_pairs_per_s", "a-run"): 12.5,
        ("orpo_tokens_per_s", "a-run"): 640.0,
        ("orpo_mfu", "a-run"): 0.5,
        ("orpo_nll_loss", "a-run"): 2.25,
        ("orpo_eval_nll_loss", "a-run", "easy"): 1.5,
        ("orpo_refused_rows", "a-run", "train", "empty_chosen"): 2.0,
        **{(f"orpo_{name}", "a-run"): value for name, value in figures},
        **{(f"orpo_eval_{name}", "a-run", "easy"): value + 1 for name, value in figures},
        **{(f"orpo_eval_{name}", "a-run", "hard"): value + 2 for name, value in figures},
    }


def test_the_board_shows_every_gauge_and_nothing_else():
    board = json.loads(BOARD.read_text())
    panels = [panel for panel in board["panels"] if panel["type"] != "row"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]]
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    asked_names = {name for expr in asked for name in re.findall(r"ray_(\w+)\{", expr)}
    assert asked_names == NAMES
    assert all('run=~"$run"' in expr for expr in asked)
    assert set(re.findall(r"ray_(\w+),", variables["run"]["definition"])) <= NAMES
    assert variables["datasource"]["type"] == "datasource"
    assert {panel["datasource"]["uid"] for panel in panels} == {"${datasource}"}
