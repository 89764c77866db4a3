"""A notebook: runs in one kernel, one after the other, and an interrupt between them."""

import os
import signal
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

from tests.conftest import ROOT

CELLS = (
    """
from orpo_ray import ORPOConfig, ORPOTrainer

pairs = {"prompt": ["a", "b"] * 8, "chosen": ["good"] * 16, "rejected": ["bad"] * 16}
few = {"per_device_train_batch_size": 4, "logging_steps": 1, "max_length": 64, "sample_prompts": 0}
first = ORPOTrainer(args=ORPOConfig(max_steps=2, **few), train_dataset=pairs).train()
""",
    """
endless = ORPOConfig(max_steps=100_000, run_name="endless", **few)
ORPOTrainer(args=endless, train_dataset=pairs).train()
""",
    """
import ray

second = ORPOTrainer(args=ORPOConfig(max_steps=3, **few), train_dataset=pairs).train()
print(first.global_step, second.global_step, first.path != second.path, ray.is_initialized())
second.metrics_dataframe
""",
)


def printed(cell: Any) -> str:
    return "".join(part["text"] for part in cell.outputs if part.output_type == "stream")


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_runs_and_an_interrupt_in_one_kernel(no_ray, tmp_path, monkeypatch):
    """The interrupt is what Jupyter sends: SIGINT to the kernel and to what it started.

    What it raises is a KeyboardInterrupt that says at which step the run has stopped.
    """
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("RAY_DEDUP_LOGS", "0")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in CELLS])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Jupyter's own packages
        client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}})
        with client.setup_kernel(cwd=str(tmp_path)):
            first, endless, second = notebook.cells
            client.execute_cell(first, 0)
            assert "'loss':" in printed(first)  # a line for every step
            thread = threading.Thread(target=interrupt, args=(client, tmp_path / "runs/endless"))
            thread.start()
            with pytest.raises(CellExecutionError, match="SignalInterrupt"):
                client.execute_cell(endless, 1)
            thread.join()
            client.execute_cell(second, 2)
    assert list((tmp_path / "runs/endless").glob("checkpoints/*/MANIFEST.json"))
    assert printed(second).splitlines()[-1] == "2 3 True True"
    assert any("text/html" in part.get("data", {}) for part in second.outputs)


def interrupt(client: NotebookClient, run: Path) -> None:
    """Interrupt the kernel once the run has made a step."""
    deadline = time.monotonic() + 400
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    os.killpg(os.getpgid(client.km.provisioner.pid), signal.SIGINT)
