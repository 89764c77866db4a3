"""The training loop on real gloo processes, without Ray."""

import hashlib
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.distributed import run_ranks
from tests.training.small_run import make_inputs, metrics_without_times, train_small


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    return folder


@pytest.fixture(scope="module")
def whole_run(inputs, tmp_path_factory) -> Path:
    """24 steps on two ranks, never interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    run_ranks(2, train_small, inputs, run, {})
    return run


def weights_digest(run: Path) -> str:
    return hashlib.sha256((run / "final" / "model.safetensors").read_bytes()).hexdigest()


def interrupted_copy(run: Path, to: Path, last_step: int) -> Path:
    """The run as it lay on disk when it was killed some time after the save at `last_step`."""
    shutil.copytree(run, to)
    shutil.rmtree(to / "final")
    for checkpoint in (to / "checkpoints").iterdir():
        if int(checkpoint.name.removeprefix("step-")) > last_step:
            shutil.rmtree(checkpoint)
    return to


def test_training_lowers_the_loss_and_raises_accuracy(whole_run):
    """24 steps on 85 pairs at a high rate: the pairs are learned by heart, step by step."""
    lines = metrics_without_times(whole_run)
    assert [line["step"] for line in lines] == [0, 5, 10, 15, 20, 24]
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"] - 0.05
    assert lines[-1]["eval_rewards/accuracies"] > lines[0]["eval_rewards/accuracies"] + 0.1


def test_every_committed_step_is_there(whole_run):
    """Every second save_steps is gone: save_total_limit is 3 in these runs."""
    names = sorted(path.name for path in (whole_run / "checkpoints").iterdir())
    assert names == [f"step-{step:08d}" for step in (14, 21, 24)]


def test_the_exported_model_loads_as_it_is(whole_run, inputs):
    model = AutoModelForCausalLM.from_pretrained(whole_run / "final")
    base = AutoModelForCausalLM.from_pretrained(inputs / "model")
    assert model.config.to_diff_dict() == base.config.to_diff_dict()
    moved = [
        not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True)
    ]
    assert all(moved)
    assert AutoTokenizer.from_pretrained(whole_run / "final").eos_token == "w1"
    assert (whole_run / "final" / "README.md").read_text().startswith("---\n")


def test_a_killed_run_with_a_damaged_checkpoint_ends_byte_identical(whole_run, inputs, tmp_path):
    """One bit flipped in a shard of the newest checkpoint: the one before is used, and says so."""
    run = interrupted_copy(whole_run, tmp_path / "run", last_step=21)
    shard = run / "checkpoints" / "step-00000021" / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    run_ranks(2, train_small, inputs, run, {})
    assert weights_digest(run) == weights_digest(whole_run)
    assert metrics_without_times(run) == metrics_without_times(whole_run)
    log = (run / "run.log").read_text()
    assert "step-00000021 set aside: __1_0.distcp does not match its checksum" in log
    assert "resumed at step 14 of 24" in log


def test_another_number_of_workers_goes_on_with_the_same_batches(whole_run, inputs, tmp_path):
    """Sums over ranks differ in their last bits, so 10 steps later by about 1e-6 relative."""
    run = interrupted_copy(whole_run, tmp_path / "run", last_step=14)
    run_ranks(1, train_small, inputs, run, {})
    for resumed, whole in zip(
        metrics_without_times(run), metrics_without_times(whole_run), strict=True
    ):
        assert resumed == pytest.approx(whole, rel=1e-4, abs=1e-6)


def test_a_finished_run_has_nothing_left_to_do(whole_run, inputs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    before = {path: path.stat().st_mtime_ns for path in (run / "final").iterdir()}
    run_ranks(2, train_small, inputs, run, {})
    assert {path: path.stat().st_mtime_ns for path in (run / "final").iterdir()} == before
    assert metrics_without_times(run) == metrics_without_times(whole_run)


def test_another_batch_size_is_refused_with_both_numbers(whole_run, inputs, tmp_path):
    run = interrupted_copy(whole_run, tmp_path / "run", last_step=14)
    with pytest.raises(AssertionError, match=r"counts 8 pairs a step, this config 4"):
        run_ranks(1, train_small, inputs, run, {"global_batch_size": 4})


def test_a_gradient_that_is_not_finite_stops_before_the_optimizer(inputs, tmp_path):
    """A learning rate of 1 on a clipped gradient soon overflows; the step and rows are named."""
    broken = tmp_path / "broken"
    shutil.copytree(inputs, broken)
    model = AutoModelForCausalLM.from_pretrained(broken / "model")
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = float("nan")
    model.save_pretrained(broken / "model")
    with pytest.raises(AssertionError, match=r"step \d+: the gradient is not finite.*Rows"):
        run_ranks(2, train_small, broken, tmp_path / "run", {"eval_steps": None})
    assert not list((tmp_path / "run").glob("checkpoints/*/MANIFEST.json"))
