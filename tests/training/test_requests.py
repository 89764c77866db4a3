"""What callbacks on the driver ask of workers: a checkpoint, and an evaluation."""

import json

from orpo_ray.runs.files import REQUESTS
from tests.reference.small_run import train_small


def test_a_checkpoint_and_an_evaluation_on_request(run_ranks, inputs, tmp_path):
    """Requests are seen after the first step; the evaluation is made after the next."""
    run = tmp_path / "run"
    run.mkdir()
    (run / REQUESTS).write_text(json.dumps({"saves": 1, "evaluations": 1}))
    few = {"max_steps": 4, "save_steps": 100, "eval_steps": None, "logging_steps": 1}
    run_ranks(2, train_small, inputs, run, few)
    saved = sorted(path.parent.name for path in run.glob("checkpoints/*/MANIFEST.json"))
    assert saved == ["step-00000001", "step-00000004"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "eval_loss" in line] == [0, 2, 4]
