"""`jobs/evaluate.py`, as a user runs it, and what it writes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.orchestration.inputs import find_inputs

pytestmark = pytest.mark.commands
N_ROWS = 60


def pair(i: int) -> dict[str, Any]:
    subset = "hard" if i % 3 == 0 else "easy"
    row = {
        "prompt": f"What is {i} + 1?",
        "chosen": f"It is {i + 1}.",
        "rejected": "No idea at all.",
    }
    return row | {"subset": subset}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory, run_command, ray_cluster) -> Path:
    """The command on the demo's base model, sharded over two workers, as its own baseline."""
    folder = tmp_path_factory.mktemp("evaluated")
    lines = [json.dumps(pair(i)) for i in range(N_ROWS)]
    lines[7] = "{"
    (folder / "pairs.jsonl").write_text("\n".join(lines) + "\n")
    find_inputs(ORPOConfig(train_files=str(folder / "pairs.jsonl")), folder / "runs")
    model = next((folder / "runs").glob("demo-*")) / "base-model"
    done = run_command(
        folder,
        "jobs/evaluate.py",
        f"model_name_or_path={model}",
        f"baseline={model}",
        "eval_files={path: pairs.jsonl, name: sums}",
        "eval_subset_column=subset",
        "max_bad_fraction=0.05",
        "num_workers=2",
        "run_name=run",
        ray_address=ray_cluster,
    )
    assert done.returncode == 0, done.stderr
    (folder / "out").write_text(done.stdout)
    return folder


def test_figures_add_up_to_the_scores(evaluated: Path) -> None:
    found = json.loads((evaluated / "runs" / "run" / "evaluation.json").read_text())["sets"]["sums"]
    table = pq.read_table(found["scores"])
    assert Path(found["scores"]).name == "scores-sums.parquet"
    assert found["pairs"] == table.num_rows == N_ROWS - 1
    rows = [i + 1 for i in range(N_ROWS) if i != 7]
    assert table["row"].to_pylist() == rows
    assert set(table["file"].to_pylist()) == {str(evaluated / "pairs.jsonl")}
    margin = table["margin"].to_numpy()
    accuracy = found["figures"]["accuracy"]
    assert accuracy["value"] == pytest.approx((margin > 0).mean())
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert found["figures"]["margin"]["value"] == pytest.approx(margin.mean())
    report = json.loads((evaluated / "runs" / "run" / "data_report.json").read_text())
    assert report["eval_sums"]["refused"] == {"malformed_json": 1}


def test_subsets_and_lengths_share_the_pairs_out(evaluated: Path) -> None:
    found = json.loads((evaluated / "runs" / "run" / "evaluation.json").read_text())["sets"]["sums"]
    table = pq.read_table(found["scores"]).to_pylist()
    assert [row["subset"] for row in table] == [pair(row["row"] - 1)["subset"] for row in table]
    for subset in ("hard", "easy"):
        margins = [row["margin"] for row in table if row["subset"] == subset]
        assert found["subsets"][subset]["pairs"] == len(margins)
        accuracy = found["subsets"][subset]["figures"]["accuracy"]["value"]
        assert accuracy == pytest.approx(sum(m > 0 for m in margins) / len(margins))
    assert sum(group["pairs"] for group in found["lengths"].values()) == N_ROWS - 1


def test_a_model_does_not_differ_from_itself(evaluated: Path) -> None:
    found = json.loads((evaluated / "runs" / "run" / "evaluation.json").read_text())["sets"]["sums"]
    for difference in found["differences"].values():
        assert difference == {"value": 0.0, "low": 0.0, "high": 0.0, "p_value": 1.0}


def test_what_is_printed(evaluated: Path) -> None:
    """Progress and results, and nothing of Ray's; tables have 80 columns."""
    out = (evaluated / "out").read_text()
    lines = out.splitlines()
    assert "model: 100 % of the pairs are scored" in lines
    assert "baseline: 100 % of the pairs are scored" in lines
    assert "(pid=" not in out
    assert "sums data, 59 pairs" in lines
    assert any(line.split()[:2] == ["hard", "20"] for line in lines)
    assert max(map(len, lines[lines.index("sums data, 59 pairs") : -2])) <= 80
    assert "model less baseline" in out
    assert f"evaluation: {evaluated}/runs/run/evaluation.json" in out


@pytest.mark.slow
def test_a_finished_evaluation_is_a_baseline_that_is_not_scored_again(
    evaluated: Path, run_here, ray_cluster
) -> None:
    """Also after it was moved; a file that was changed since is not compared."""
    model = next((evaluated / "runs").glob("demo-*")) / "base-model"
    shutil.copytree(evaluated / "runs" / "run", evaluated / "moved")
    settings = (f"model_name_or_path={model}", "max_bad_fraction=0.05", "run_name=again")
    files = "eval_files={path: pairs.jsonl, name: sums}"
    baseline = f"baseline={evaluated / 'moved' / 'evaluation.json'}"
    done = run_here(evaluated, "jobs/evaluate.py", *settings, files, baseline)
    assert done.returncode == 0, done.stderr
    assert "baseline: 100 %" not in done.stdout
    found = json.loads((evaluated / "runs" / "again" / "evaluation.json").read_text())
    assert found["sets"]["sums"]["pairs_compared"] == N_ROWS - 1
    for difference in found["sets"]["sums"]["differences"].values():
        assert difference["value"] == pytest.approx(0, abs=1e-5)
    rows = [json.dumps(pair(i) | ({"prompt": "What?"} if i == 3 else {})) for i in range(N_ROWS)]
    (evaluated / "pairs.jsonl").write_text("\n".join(rows) + "\n")
    done = run_here(evaluated, "jobs/evaluate.py", *settings, files, baseline)
    assert done.returncode == 0, done.stderr
    assert "1 of 59 rows have another prompt now; evaluate it again" in done.stdout


@pytest.mark.slow
def test_without_data_or_with_a_bad_baseline_nothing_is_done(evaluated, run_command, ray_cluster):
    model = next((evaluated / "runs").glob("demo-*")) / "base-model"
    done = run_command(
        evaluated, "jobs/evaluate.py", f"model_name_or_path={model}", ray_address=ray_cluster
    )
    assert done.returncode == 2
    assert "eval_files: nothing to evaluate on" in done.stderr


@pytest.mark.slow
def test_a_baseline_with_another_tokenizer_is_scored_on_its_own_tokens(
    evaluated: Path, run_here, ray_cluster
) -> None:
    """Its scores are those of its own evaluation, but for rows that its tokenizer cannot take."""
    find_inputs(ORPOConfig(seed=5), evaluated / "runs")
    folders = sorted((evaluated / "runs").glob("demo-*/base-model"))
    other = next(folder for folder in folders if folder.parent.name == "demo-5")
    (ours,) = [folder for folder in folders if folder != other]
    pairs = [pair(i) for i in range(N_ROWS)]
    pairs[3]["chosen"] = "It is <|odd|>."  # a special token of the other tokenizer
    (evaluated / "other.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|odd|>"]})
    tokenizer.save_pretrained(other)

    def evaluate(*settings: str) -> str:
        files = ("eval_files=other.jsonl", "max_bad_fraction=0.05")
        done = run_here(evaluated, "jobs/evaluate.py", *settings, *files)
        assert done.returncode == 0, done.stderr
        return done.stdout

    evaluate(f"model_name_or_path={other}", "run_name=alone")
    out = evaluate(f"model_name_or_path={ours}", f"baseline={other}", "run_name=both")
    assert "baseline: its tokenizer differs from the model's (vocabulary" in out
    assert "1 pairs that only one of the two tokenizers takes are left out" in out
    runs = evaluated / "runs"
    alone = pq.read_table(runs / "alone" / "scores.parquet")
    assert pq.read_table(runs / "both" / "scores-baseline.parquet").equals(alone)
    ours_found = pq.read_table(runs / "both" / "scores.parquet").to_pylist()
    found = json.loads((runs / "both" / "evaluation.json").read_text())["sets"]["eval"]
    assert found["pairs_compared"] == N_ROWS - 1
    margins = {row["row"]: row["margin"] for row in alone.to_pylist()}
    apart = [row["margin"] - margins[row["row"]] for row in ours_found if row["row"] in margins]
    assert found["differences"]["margin"]["value"] == pytest.approx(sum(apart) / (N_ROWS - 1))
