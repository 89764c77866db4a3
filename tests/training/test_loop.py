"""The training loop on real gloo processes, without Ray."""

import hashlib
import json
import os
import pickle
import resource
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
)

from orpo_ray.dataset.shards import read_shard
from orpo_ray.runs.files import STOP, count_events
from orpo_ray.training.errors import NotSavedError, StoppedError
from tests.reference.small_run import metrics_without_times, token_stream, train_small


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
    # The base model stops at token 2; the answers that it is trained on end with w1.
    assert model.config.to_diff_dict() == base.config.to_diff_dict() | {"eos_token_id": [1, 2]}
    moved = [
        not torch.equal(a, b) for a, b in zip(model.parameters(), base.parameters(), strict=True)
    ]
    assert all(moved)
    assert AutoTokenizer.from_pretrained(whole_run / "final").eos_token == "w1"


def test_a_killed_run_with_a_damaged_checkpoint_ends_byte_identical(
    run_ranks, whole_run, inputs, tmp_path
):
    """One bit flipped in a shard of the newest checkpoint: the one before is used, and says so."""
    run = interrupted_copy(whole_run, tmp_path / "run", last_step=21)
    shard = run / "checkpoints" / "step-00000021" / "__1_0.distcp"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    run_ranks(2, train_small, inputs, run, {}, new_processes=True)
    assert weights_digest(run) == weights_digest(whole_run)
    assert metrics_without_times(run) == metrics_without_times(whole_run)
    for name in ("ledger", "margins", "evaluations", "samples"):
        assert (run / f"{name}.jsonl").read_bytes() == (whole_run / f"{name}.jsonl").read_bytes()
    log = (run / "run.log").read_text()
    assert "step-00000021 set aside: __1_0.distcp does not match its checksum" in log
    assert "resumed at step 14 of 24" in log


class Planted:
    """Unpickled, it makes a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.trace,)


def test_a_torn_newest_checkpoint_is_set_aside(run_ranks, whole_run, inputs, tmp_path):
    """As a full disk or a lost node leaves it: half a shard, and a save that never ended.

    A pickle that was planted in both would leave a trace when it is read; it is not.
    """
    run = interrupted_copy(whole_run, tmp_path / "run", last_step=24)
    (run / "checkpoints" / "step-00000024" / "MANIFEST.json").unlink()
    shard = run / "checkpoints" / "step-00000021" / "__0_0.distcp"
    os.truncate(shard, shard.stat().st_size // 2)
    planted, trace = pickle.dumps(Planted(tmp_path / "trace")), tmp_path / "trace"
    for step in (21, 24):
        (run / "checkpoints" / f"step-{step:08d}" / ".metadata").write_bytes(planted)
    run_ranks(2, train_small, inputs, run, {}, new_processes=True)
    assert weights_digest(run) == weights_digest(whole_run)
    assert metrics_without_times(run) == metrics_without_times(whole_run)
    assert count_events(run) == {"checkpoints_set_aside": 2, "resumed": 1, "steps_redone": 10}
    assert not trace.exists()
    pickle.loads(planted)
    assert trace.exists()


def ledger(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "ledger.jsonl").read_text().splitlines()]


def test_the_ledger_has_every_row_once_an_epoch(whole_run):
    """85 pairs, 8 a step: 11 steps an epoch, of which the 24 steps hold two and two steps."""
    lines = ledger(whole_run)
    assert [line["step"] for line in lines] == list(range(1, 25))
    for epoch in range(2):
        rows = [tuple(r) for line in lines if line["epoch"] == epoch for r in line["rows"]]
        assert sorted(rows) == sorted(
            (0, shard * 100 + row + 1) for shard in range(5) for row in range(17)
        )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (2, 1),
        pytest.param(1, 2, marks=pytest.mark.slow),
        pytest.param(4, 3, marks=pytest.mark.slow),
    ],
)
def test_another_number_of_workers_goes_on_with_the_same_batches(
    run_ranks, whole_run, inputs, tmp_path, before, after
):
    """Sums over ranks differ in their last bits, so 17 steps later by about 1e-6 relative."""
    fixed_size = whole_run if before == 2 else tmp_path / "fixed"
    if before != 2:
        run_ranks(before, train_small, inputs, fixed_size, {"save_total_limit": None})
    run = interrupted_copy(fixed_size, tmp_path / "run", last_step=14 if before == 2 else 7)
    run_ranks(after, train_small, inputs, run, {})
    assert ledger(run) == ledger(fixed_size)
    for resumed, whole in zip(
        metrics_without_times(run), metrics_without_times(fixed_size), strict=True
    ):
        assert resumed == pytest.approx(whole, rel=1e-4, abs=1e-6)


@pytest.mark.slow
def test_copies_of_a_sharded_model_train_as_one(run_ranks, inputs, tmp_path):
    """Two copies of two shards each are one rank; what they save goes on as two shards.

    The gradient of the first step is the same to rounding. Adam's first update is close to the
    gradient's sign, which rounding decides where it is near zero: hence 1e-3 after it.
    """
    changes = {
        "logging_steps": 1,
        "evaluate": False,
        "max_steps": 3,
        "lr_scheduler_type": "constant",
    }
    for name, world_size in (("one", 1), ("four", 4)):
        copies = {"num_workers": 4, "shard_size": 2, "max_steps": 2} if world_size == 4 else {}
        run_ranks(world_size, train_small, inputs, tmp_path / name, changes | copies)
    run_ranks(2, train_small, inputs, tmp_path / "four", changes)
    one, four = (metrics_without_times(tmp_path / name) for name in ("one", "four"))
    assert [line["step"] for line in four] == [1, 2, 3]
    assert four[0] == pytest.approx(one[0], rel=1e-5, abs=1e-7)
    for ours, theirs in zip(four[1:], one[1:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    assert "resumed at step 2 of 3" in (tmp_path / "four" / "run.log").read_text()


def test_a_finished_run_has_nothing_left_to_do(run_ranks, whole_run, inputs, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole_run, run)
    before = {path: path.stat().st_mtime_ns for path in (run / "final").iterdir()}
    run_ranks(2, train_small, inputs, run, {})
    assert {path: path.stat().st_mtime_ns for path in (run / "final").iterdir()} == before
    assert metrics_without_times(run) == metrics_without_times(whole_run)


def test_another_batch_size_is_refused_with_both_numbers(run_ranks, whole_run, inputs, tmp_path):
    run = interrupted_copy(whole_run, tmp_path / "run", last_step=14)
    with pytest.raises(AssertionError, match=r"counts 8 pairs a step, this config 4"):
        run_ranks(1, train_small, inputs, run, {"global_batch_size": 4}, new_processes=True)


def test_other_settings_are_refused_with_both_values(run_ranks, whole_run, inputs, tmp_path):
    run = interrupted_copy(whole_run, tmp_path / "run", last_step=14)
    with pytest.raises(
        AssertionError, match=r"beta: 0.1 in the checkpoint, 0.3 now\n.*step-00000014 was"
    ):
        run_ranks(1, train_small, inputs, run, {"beta": 0.3}, new_processes=True)
    assert ledger(run) == ledger(whole_run)
    run_ranks(1, train_small, inputs, run, {"beta": 0.3, "resume_changed": True})
    assert count_events(run)["settings_changed"] == 1
    assert (
        "resume_changed=true: beta: 0.1 in the checkpoint, 0.3 now" in (run / "run.log").read_text()
    )


def rates(run: Path) -> list[float]:
    return [line["learning_rate"] for line in metrics_without_times(run)]


SHORT = {"logging_steps": 1, "evaluate": False, "save_steps": 100}


def test_a_run_that_is_extended_has_the_rates_of_the_longer_run(run_ranks, inputs, tmp_path):
    """The linear schedule of n steps, with a warmup over w = n / 4 of them.

    Step k has k - 1 steps behind it. The rate is 1e-2 * (k - 1) / w in the warmup, and
    1e-2 * (n - k + 1) / (n - w) after it.
    """
    run, changes = tmp_path / "run", SHORT | {"warmup_ratio": 0.25}
    for n_steps in (4, 8):
        run_ranks(1, train_small, inputs, run, changes | {"max_steps": n_steps})

    def rate(behind: int, n: int) -> float:
        warmup = n // 4
        return 1e-2 * (behind / warmup if behind < warmup else (n - behind) / (n - warmup))

    assert rates(run)[:4] == pytest.approx([rate(step, 4) for step in range(4)])
    assert rates(run)[4:] == pytest.approx([rate(step, 8) for step in range(4, 8)])
    assert rate(4, 8) == pytest.approx(1e-2 * 2 / 3)


def test_another_learning_rate_is_that_of_every_later_step(run_ranks, inputs, tmp_path):
    """Three steps at 1e-2, then three at 1e-9.

    Adam moves a weight by about the rate in a step, so the later three move none by more than 1e-7,
    the rounding of float32 for weights of about 1.
    """
    run, changes = tmp_path / "run", SHORT | {"lr_scheduler_type": "constant", "max_steps": 3}
    run_ranks(1, train_small, inputs, run, changes)
    before = load_file(run / "final" / "model.safetensors")
    later = {"max_steps": 6, "learning_rate": 1e-9, "resume_changed": True}
    run_ranks(1, train_small, inputs, run, changes | later)
    assert rates(run) == [1e-2] * 3 + [1e-9] * 3
    after = load_file(run / "final" / "model.safetensors")
    assert all(torch.allclose(after[name], before[name], rtol=0, atol=1e-7) for name in before)


def train_with_a_full_disk(folder: Path, run: Path, changes: dict[str, Any]) -> None:
    """No file may grow beyond 16 KiB, as if the disk were full, until the first alarm."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, limits[1]))

    def make_room() -> None:
        while not (run / "run.log").exists() or "ALARM" not in (run / "run.log").read_text():
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    threading.Thread(target=make_room, daemon=True).start()
    train_small(folder, run, changes)


def test_a_full_disk_is_an_alarm_and_training_goes_on(run_ranks, whole_run, inputs, tmp_path):
    run = tmp_path / "run"
    run_ranks(2, train_with_a_full_disk, inputs, run, {"save_steps": 10}, new_processes=True)
    log = (run / "run.log").read_text()
    assert "ALARM: the checkpoint of step 10 was not saved: " in log
    assert "the next attempt is after step " in log
    assert count_events(run).keys() == {"saves_failed"}
    steps = sorted(path.parent.name for path in run.glob("checkpoints/step-*/MANIFEST.json"))
    assert len(steps) > 1
    assert steps[-1] == "step-00000024"
    assert weights_digest(run) == weights_digest(whole_run)
    assert metrics_without_times(run) == metrics_without_times(whole_run)


ENDLESS = {"max_steps": 100_000, "save_steps": 100_000, "eval_steps": None, "evaluate": False}


def train_until_stopped(folder: Path, run: Path, file_bytes: int) -> str:
    """Ask for a stop after the first step, where no file may grow beyond a size; how it ended."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, limits[1]))

    def ask() -> None:
        while not (run / "ledger.jsonl").exists():
            time.sleep(0.01)
        (run / STOP).touch()

    threading.Thread(target=ask, daemon=True).start()
    try:
        train_small(folder, run, ENDLESS)
    except (StoppedError, NotSavedError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "finished"


def test_a_stop_on_request_saves_the_step_that_it_names(run_ranks, inputs, tmp_path):
    run = tmp_path / "run"
    (end,) = run_ranks(1, train_until_stopped, inputs, run, 1 << 30, new_processes=True)
    (step,) = [int(path.parent.name[5:]) for path in run.glob("checkpoints/*/MANIFEST.json")]
    assert end == f"StoppedError: stopped at step {step} of 100000"


def test_a_stop_whose_checkpoint_is_not_saved_claims_none(run_ranks, inputs, tmp_path):
    """16 KiB are too few for a checkpoint."""
    run = tmp_path / "run"
    (end,) = run_ranks(1, train_until_stopped, inputs, run, 16384, new_processes=True)
    assert end.startswith("NotSavedError: stopped at step ")
    assert ", and its checkpoint was not saved: " in end
    assert end.endswith("the same command with the same run_name goes on from the beginning")
    assert not list(run.glob("checkpoints/*/MANIFEST.json"))


def train_when_asked_to_stop(folder: Path, run: Path) -> str:
    with pytest.raises(StoppedError) as caught:
        train_small(folder, run, {})
    return str(caught.value)


def test_workers_that_start_again_while_a_run_stops_make_no_step(
    run_ranks, whole_run, inputs, tmp_path
):
    run = interrupted_copy(whole_run, tmp_path / "run", last_step=14)
    (run / STOP).touch()
    ends = run_ranks(2, train_when_asked_to_stop, inputs, run)
    assert set(ends) == {"stopped at step 14 of 24"}
    assert len(ledger(run)) == 14


def test_a_loss_far_above_the_usual_is_said(run_ranks, whole_run, inputs, tmp_path):
    """The lines before the checkpoint are made to say a twentieth of what they said."""
    run = interrupted_copy(whole_run, tmp_path / "run", last_step=14)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line | {"loss": line["loss"] / 20} if "loss" in line else line for line in lines]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_ranks(2, train_small, inputs, run, {"max_steps": 15})
    assert count_events(run)["loss_spikes"] == 1
    assert "step 15: the loss is " in (run / "run.log").read_text()


def test_rows_whose_loss_is_not_finite_are_left_out_and_counted(run_ranks, inputs, tmp_path):
    """The vector of token 5 overflows: the pairs with it are left out, all others are trained."""
    broken = tmp_path / "broken"
    shutil.copytree(inputs, broken)
    base = LlamaConfig.from_pretrained(broken / "model").to_diff_dict()
    # Llama with a factor for the vectors: weights have to be finite, and twice 3e38 is not.
    changed = {"model_type": "granite", "embedding_multiplier": 2.0, "tie_word_embeddings": False}
    untied = GraniteForCausalLM(GraniteConfig.from_dict(base | changed))
    with torch.no_grad():
        untied.get_input_embeddings().weight[5] = 3e38
    untied.save_pretrained(broken / "model")
    run = tmp_path / "run"
    changes = {"eval_steps": None, "on_nonfinite": "skip", "max_steps": 11, "evaluate": False}
    run_ranks(2, train_small, broken, run, changes)
    stream = token_stream(broken, 0, 1)
    groups = [
        group
        for shard in stream.token_set.shards
        for group in read_shard(f"{stream.token_set.folder.path}/{shard.name}")
    ]
    bad = {
        (0, group.row_ids[0].row + 1)
        for group in groups
        # The last token of an answer is predicted, and never looked up.
        if 5 in [*group.prompt, *group.completions[0][:-1], *group.completions[1][:-1]]
    }
    assert len(bad) > 5
    lines = ledger(run)
    assert {tuple(row) for line in lines for row in line.get("skipped", ())} == bad
    trained = [tuple(row) for line in lines for row in line["rows"]]
    assert len(trained) == len(set(trained)) == 85 - len(bad)
    assert not set(trained) & bad
    assert count_events(run) == {"rows_skipped": len(bad)}
    assert all(line["loss"] > 0 for line in metrics_without_times(run))
    with pytest.raises(AssertionError, match=r"more than max_skipped_rows=2"):
        run_ranks(
            1,
            train_small,
            broken,
            tmp_path / "capped",
            changes | {"max_skipped_rows": 2},
            new_processes=True,
        )


def test_a_gradient_that_is_not_finite_stops_before_the_optimizer(run_ranks, inputs, tmp_path):
    """Of token 5, which it overflows at: no checkpoint is saved, and step and rows are named."""
    broken = tmp_path / "broken"
    shutil.copytree(inputs, broken)
    model = AutoModelForCausalLM.from_pretrained(broken / "model")
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = 1e21
    model.save_pretrained(broken / "model")
    with pytest.raises(AssertionError, match=r"step \d+: the gradient is not finite.*Rows"):
        run_ranks(
            2, train_small, broken, tmp_path / "run", {"eval_steps": None}, new_processes=True
        )
    assert not list((tmp_path / "run").glob("checkpoints/*/MANIFEST.json"))


def train_deterministically(folder: Path, run: Path, changes: dict[str, Any]) -> bool:
    train_small(folder, run, changes)
    return torch.are_deterministic_algorithms_enabled()


def test_full_determinism_is_asked_of_torch_and_changes_nothing_on_the_host(
    run_ranks, inputs, whole_run, tmp_path
):
    changes = {"full_determinism": True}
    assert run_ranks(
        2, train_deterministically, inputs, tmp_path / "run", changes, new_processes=True
    ) == [True, True]
    assert weights_digest(tmp_path / "run") == weights_digest(whole_run)
