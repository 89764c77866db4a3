"""The page on Ray: its Python runs as it stands, and every way ends with the same weights."""

import json
import os
from pathlib import Path

import pytest
import ray.train
from safetensors.torch import load_file

from orpo_ray.demo.model import make_demo_model
from tests.conftest import ROOT
from tests.test_docs import blocks

PAGE = ROOT / "docs" / "ray.md"


@pytest.mark.slow
@pytest.mark.commands
@pytest.mark.timeout(1200)
@pytest.mark.filterwarnings("ignore:The `parse_obj` method")  # Ray 2.60 reads its file with it.
def test_the_ways_of_the_page(no_ray, run_command, tmp_path, monkeypatch, capsys):
    """The job is run by `tests/cluster/test_jobs.py`."""
    rows = [
        {"prompt": f"What is {i} + 1?", "chosen": f"It is {i + 1}.", "rejected": f"It is {i}."}
        for i in range(40)
    ]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_demo_model(str(tmp_path / "base"), [text for row in rows for text in row.values()], 1)
    monkeypatch.chdir(tmp_path)
    # A trial that ends early frees its workers by the dashboard.
    ray.init(address="local", num_cpus=2, include_dashboard=True, log_to_driver=False)
    try:
        address = ray.get_runtime_context().gcs_address
        (command,) = blocks("bash", PAGE)[0].splitlines()
        done = run_command(tmp_path, *command.split()[1:], ray_address=address)
        assert done.returncode == 0, done.stderr
        names: dict[str, object] = {}
        for block in blocks("python", PAGE):
            exec(compile(block, "ray.md", "exec"), names)
        assert ray.is_initialized()
    finally:
        ray.shutdown()
    runs = tmp_path / "runs"
    weights = load_file(runs / "by_command" / "final" / "model.safetensors")
    best = Path(capsys.readouterr().out.splitlines()[-1])
    for model in (runs / "in_notebook/final", runs / "in_task/final", best):
        others = load_file(model / "model.safetensors")
        assert all(weights[name].equal(others[name]) for name in weights), model
    found = ray.train.Result.from_path(os.fspath(runs / "in_notebook"))
    assert found.checkpoint is not None
    assert Path(found.checkpoint.path) == runs / "in_notebook" / "final"
    assert found.metrics["eval_loss"] == names["result"].metrics["eval_loss"]
