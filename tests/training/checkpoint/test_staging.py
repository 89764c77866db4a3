"""Host copies of a checkpoint: what is kept for the next one; training does not change them."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.models.build import build_model
from orpo_ray.objective.metrics import N_SUMS
from orpo_ray.objective.objectives import orpo
from orpo_ray.runs.manifest import read_manifest
from orpo_ray.storage.folder import Folder
from orpo_ray.training.checkpoint.saver import CheckpointSaver, Progress, load_checkpoint
from orpo_ray.training.checkpoint.staging import Staging
from orpo_ray.training.optimizer import build_optimizer, build_scheduler
from orpo_ray.training.step import TrainState, train_step
from tests.reference.small_run import token_stream


class Training:
    """A small model on this rank, with a few steps to take."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        config = ORPOConfig(learning_rate=1e-2, **settings)
        device = torch.device("cpu")
        model = build_model(config, str(folder / "model"), device)
        optimizer = build_optimizer(model, config.train)
        scheduler = build_scheduler(optimizer, config.train, 20)
        self.state = TrainState(model, optimizer, scheduler, orpo(0.1), 1.0, 0, device)
        stream = token_stream(folder, dist.get_rank(), dist.get_world_size())
        self.batches = stream.batches(0, 20)

    def step(self) -> None:
        """Update the weights with the next batch."""
        train_step(self.state, next(self.batches), torch.zeros(N_SUMS, dtype=torch.float64))

    def tensors(self) -> dict[str, Any]:
        """A state dict of weights, moments, and a number that differs from step to step."""
        model = self.state.model
        moments = self.state.optimizer.state
        return {
            "model": dict(model.named_parameters()),
            "optimizer": {name: moments[p] for name, p in model.named_parameters()},
            "groups": [{"lr": self.state.scheduler.get_last_lr()[0]}],
        }


def leaves(tree: Any) -> list[Any]:
    """All tensors of this rank in a state dict, and what else it has."""
    if isinstance(tree, dict | list):
        values = tree.values() if isinstance(tree, dict) else tree
        return [leaf for value in values for leaf in leaves(value)]
    tree = tree.detach() if isinstance(tree, torch.Tensor) else tree
    return [tree.to_local() if hasattr(tree, "to_local") else tree]


def places(tree: Any) -> list[int]:
    return [leaf.data_ptr() for leaf in leaves(tree) if isinstance(leaf, torch.Tensor)]


def equal(left: Any, right: Any) -> bool:
    pairs = zip(leaves(left), leaves(right), strict=True)
    return all(torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs)


def two_copies(folder: Path, keeps_memory: bool) -> dict[str, bool]:
    training = Training(folder)
    training.step()
    staging = Staging(keeps_memory)
    staging.allocate(training.tensors())
    training.step()
    first = staging.copy(training.tensors())
    before = [leaf.clone() for leaf in leaves(first) if isinstance(leaf, torch.Tensor)]
    found = {"equals its source": equal(first, training.tensors())}
    used = places(first)
    training.step()
    found["moves on"] = equal(first, training.tensors())
    found["stays as it was"] = equal(
        [leaf for leaf in leaves(first) if isinstance(leaf, torch.Tensor)], before
    )
    second = staging.copy(training.tensors())
    found["equals its source too"] = equal(second, training.tensors())
    found["the same memory"] = places(second) == used
    found["other memory"] = not set(places(second)) & set(used)
    return found


def test_copies_share_their_memory_but_not_the_weights(run_ranks, inputs):
    """Rates differ from step to step, and are no tensors: those of the source are taken."""
    for found in run_ranks(2, two_copies, inputs, True):
        assert found == {
            "equals its source": True,
            "moves on": False,
            "stays as it was": True,
            "equals its source too": True,
            "the same memory": True,
            "other memory": False,
        }


def test_on_the_host_no_memory_is_kept(run_ranks, inputs):
    for found in run_ranks(2, two_copies, inputs, False):
        assert not found["moves on"]
        assert found["equals its source too"]
        assert found["other memory"]


def test_another_state_dict_gets_other_memory():
    staging = Staging(keeps_memory=True)
    first = staging.copy({"a": torch.arange(3), "b": [1]})
    second = staging.copy({"a": torch.arange(4), "b": [2]})
    assert (second["a"].tolist(), second["b"]) == ([0, 1, 2, 3], [2])
    third = staging.copy({"a": torch.zeros(4), "b": [torch.ones(2)]})
    assert third["a"].dtype == torch.float32
    assert third["b"][0].tolist() == [1, 1]
    assert first["a"].tolist() == [0, 1, 2]


def saves(folder: Path, run: Path, keeps_memory: bool) -> dict[str, Any]:
    """Three saves, of which the second one fails, each with a step beside it."""
    training = Training(folder)
    state = training.state
    training.step()
    saver = CheckpointSaver(Folder.at(run), None, keeps_memory)
    saver.prepare(state.model, state.optimizer)
    problems, weights = [], []
    for step in (1, 2, 3):
        dist.barrier()
        if step == 2 and dist.get_rank() == 0:
            (run / "checkpoints").rename(run / "aside")
            (run / "checkpoints").write_text("in the way")
        dist.barrier()
        weights.append([p.to_local().clone() for p in state.model.parameters()])
        saver.start(
            state.model, state.optimizer, Progress(step, 8, ((0.0,),), 0, 0), {"step": step}
        )
        training.step()
        problems.append(saver.finish())
        dist.barrier()
        if step == 2 and dist.get_rank() == 0:
            (run / "checkpoints").unlink()
            (run / "aside").rename(run / "checkpoints")
    for step in (1, 3):
        load_checkpoint(Folder.at(run), step, state.model, state.optimizer)
        loaded = [p.to_local() for p in state.model.parameters()]
        assert all(map(torch.equal, loaded, weights[step - 1]))
    manifests = [read_manifest(run / f"checkpoints/step-{step:08}")["files"] for step in (1, 3)]
    tensors = [{n: f for n, f in files.items() if n.endswith(".distcp")} for files in manifests]
    return {"problems": problems, "tensors": tensors}


def test_files_are_equal_and_a_save_that_fails_costs_the_next_nothing(run_ranks, inputs, tmp_path):
    """With memory that is kept and without; the weights move on while they are written."""
    kept, released = (
        run_ranks(2, saves, inputs, tmp_path / str(keeps_memory), keeps_memory)[0]
        for keeps_memory in (True, False)
    )
    first, second, third = kept["problems"]
    assert (first, third) == (None, None)
    assert "checkpoints" in second
    assert kept["tensors"] == released["tensors"]
    assert kept["tensors"][0] != kept["tensors"][1]
    assert kept["tensors"][0].keys() == {"__0_0.distcp", "__1_0.distcp"}
