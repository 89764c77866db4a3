"""The embedded demo as `make demo` runs it, and the same without the odds-ratio term."""

import json
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def accuracies(run: Path) -> tuple[float, float]:
    """Held-out reward accuracy before the first step and after the last."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    found = [x["eval_rewards/accuracies"] for x in lines if "eval_rewards/accuracies" in x]
    return found[0], found[-1]


def test_the_demo_learns_and_only_with_the_odds_ratio_term(run_command, tmp_path):
    """The held-out set has 400 pairs, so 0.5 is known to 0.075 (three standard errors)."""
    demo = run_command(tmp_path, "jobs/train.py", "run_name=demo", timeout_s=550)
    assert demo.returncode == 0, demo.stderr
    before, after = accuracies(tmp_path / "runs" / "demo")
    assert abs(before - 0.5) < 0.075
    assert after >= 0.90
    assert f"held-out reward accuracy: {before:.3f} before, {after:.3f} after" in demo.stdout
    assert f"run directory: {tmp_path}/runs/demo" in demo.stdout
    plain = run_command(tmp_path, "jobs/train.py", "beta=0", "run_name=plain", timeout_s=550)
    assert plain.returncode == 0, plain.stderr
    assert accuracies(tmp_path / "runs" / "plain")[1] < 0.75
