"""The embedded demo as `make demo` runs it, and the same without the odds-ratio term."""

import json
import random
import re
from importlib import resources
from pathlib import Path

import pytest
import yaml

from orpo_ray.demo.pairs import write_demo_pairs
from orpo_ray.orchestration.inputs import DEMO_TRAIN_PAIRS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def accuracies(run: Path) -> tuple[float, float]:
    """Held-out reward accuracy before the first step and after the last."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [x["eval_rewards/accuracies"] for x in lines if "eval_rewards/accuracies" in x]
    return found[0], found[-1]


def test_flipped_pairs_are_among_the_first_suspects(run_command, tmp_path):
    """5 % of the demo's pairs the wrong way round: 70 % of them in the first 5 % of the list.

    Six passes: the fewer, the less a model knows while it meets a pair (benchmarks/RESULTS.md).
    """
    train, _ = write_demo_pairs(str(tmp_path), DEMO_TRAIN_PAIRS, 0, 42)
    pairs = [json.loads(line) for line in Path(train).read_text().splitlines()]
    flipped = set(random.Random(2).sample(range(1, len(pairs) + 1), len(pairs) // 20))
    for row in flipped:
        pair = pairs[row - 1]
        pair["chosen"], pair["rejected"] = pair["rejected"], pair["chosen"]
    Path(train).write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    settings = yaml.safe_load(resources.files("orpo_ray.demo").joinpath("demo.yaml").read_text())
    settings["orpo"]["beta"] = 1.0  # as measured there
    settings["train"] |= {"num_train_epochs": 6, "seed": 2, "eval_steps": None}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    arguments = ("config.yaml", "train_files=train.jsonl", "run_name=flipped")
    done = run_command(tmp_path, "jobs/train.py", *arguments, timeout_s=1100)
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "runs" / "flipped" / "suspects.jsonl").read_text().splitlines()
    assert len(lines) == len(pairs)
    first = {json.loads(line)["row"] for line in lines[: len(flipped)]}
    assert len(first & flipped) >= 0.7 * len(flipped)


def test_the_demo_learns_and_only_with_the_odds_ratio_term(run_command, tmp_path):
    """The held-out set has 400 pairs, so 0.5 is known to 0.075 (three standard errors)."""
    demo = run_command(tmp_path, "jobs/train.py", "run_name=demo", timeout_s=550)
    assert demo.returncode == 0, demo.stderr
    before, after = accuracies(tmp_path / "runs" / "demo")
    assert abs(before - 0.5) < 0.075
    assert after >= 0.95
    assert re.search(
        rf"held-out accuracy: {before:.3f} \([0-9. to]+\) before, {after:.3f} \([0-9. to]+\) after",
        demo.stdout,
    )
    assert f"run directory: {tmp_path}/runs/demo" in demo.stdout
    plain = run_command(tmp_path, "jobs/train.py", "beta=0", "run_name=plain", timeout_s=550)
    assert plain.returncode == 0, plain.stderr
    assert accuracies(tmp_path / "runs" / "plain")[1] < 0.75
