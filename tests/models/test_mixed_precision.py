"""One rank without FSDP computes what it computes with FSDP, to the byte."""

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from orpo_ray.dataset.packing import pack
from orpo_ray.models.microbatch import Microbatch
from orpo_ray.models.mixed_precision import MixedPrecision
from orpo_ray.models.orpo_model import OrpoModel
from orpo_ray.models.whole_root import whole_root
from orpo_ray.objective.head import LossScale
from orpo_ray.objective.objectives import orpo
from tests.reference.models import odd_groups, tiny_model
from tests.reference.small_run import metrics_without_times, train_small

CPU = torch.device("cpu")
BF16 = {"bf16": True, "max_steps": 6, "eval_steps": 3}
FROZEN = ("model.layers.0.self_attn.q_proj.weight", "model.norm")


@pytest.fixture(scope="module")
def untied(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gradients of a tied weight FSDP adds in another order than autograd."""
    folder = tmp_path_factory.mktemp("untied") / "inputs"
    shutil.copytree(inputs, folder)
    config = LlamaConfig.from_pretrained(folder / "model", tie_word_embeddings=False)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    return folder


def with_fsdp(inputs: Path, run: Path, changes: dict[str, Any]) -> dict[str, Any]:
    """Train on this rank, whose model is sharded as those of several ranks are."""
    with patch("orpo_ray.models.build.is_unsharded", lambda *_: False):
        return train_small(inputs, run, changes)


@pytest.mark.parametrize(
    "changes",
    [
        BF16,
        BF16 | {"gradient_checkpointing": True, "frozen_weights": FROZEN},
        BF16 | {"lora_r": 4},
        BF16 | {"bf16": False},
    ],
    ids=str,
)
def test_a_run_without_fsdp_ends_with_the_bytes_of_one_with_it(
    run_ranks, untied, tmp_path, changes
):
    """Several passes a step, an evaluation and sampled answers in between."""
    for name, function in (("own", train_small), ("fsdp", with_fsdp)):
        run_ranks(1, function, untied, tmp_path / name, changes)
    files = [sorted((tmp_path / name / "final").glob("*.safetensors")) for name in ("own", "fsdp")]
    assert [file.read_bytes() for file in files[0]] == [file.read_bytes() for file in files[1]]
    own, fsdp = (metrics_without_times(tmp_path / name) for name in ("own", "fsdp"))
    assert own
    assert own == fsdp


def test_a_run_goes_on_from_a_checkpoint_of_sharded_weights(run_ranks, untied, tmp_path):
    """And the other way round."""
    order = {"there": (with_fsdp, train_small), "back": (train_small, with_fsdp)}
    constant = BF16 | {"lr_scheduler_type": "constant"}
    for name, (first, second) in order.items():
        run_ranks(1, first, untied, tmp_path / name, constant | {"max_steps": 3})
        run_ranks(1, second, untied, tmp_path / name, constant)
    run_ranks(1, train_small, untied, tmp_path / "whole", constant)
    weights = {name: tmp_path / name / "final/model.safetensors" for name in (*order, "whole")}
    there, back, whole = (path.read_bytes() for path in weights.values())
    assert there == back == whole


@pytest.fixture
def model() -> OrpoModel:
    model = OrpoModel(tiny_model("llama-tied", torch.float32), "packed", None)
    model.mixed_precision = MixedPrecision(model, torch.bfloat16)
    return model


def forward(model: OrpoModel) -> torch.Tensor:
    row = pack(odd_groups(1), 16, prompt_counts=True)
    loss: torch.Tensor = model(Microbatch(row, CPU), LossScale(0.1, 0.1, orpo(1.0))).loss
    return loss


def dtypes(model: OrpoModel) -> set[torch.dtype]:
    return {p.dtype for p in model.parameters()}


def test_the_copies_are_there_from_forward_to_the_end_of_backward(model):
    weights = list(model.parameters())
    loss = forward(model)
    assert dtypes(model) == {torch.bfloat16}
    loss.backward()
    assert all(own is found for own, found in zip(weights, model.parameters(), strict=True))
    assert {p.grad.dtype for p in weights if p.grad is not None} == {torch.float32}
    first = [p.grad.clone() for p in weights if p.grad is not None]
    forward(model).backward()
    second = [p.grad for p in weights if p.grad is not None]
    assert all(torch.equal(2 * a, b) for a, b in zip(first, second, strict=True))


def test_the_weights_are_back_after_a_pass_without_gradients_and_one_that_fails(model):
    with torch.no_grad():
        expected = forward(model)
    assert dtypes(model) == {torch.float32}
    no_memory = RuntimeError("no memory")
    with patch.object(model, "decode", side_effect=no_memory), pytest.raises(RuntimeError):
        forward(model)
    assert dtypes(model) == {torch.float32}
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
        assert forward(model) != expected  # of the weights as they are now


def test_a_backward_pass_that_fails_on_its_way_leaves_no_gradients(model):
    """The last layer's weights have theirs when the first layer's output runs out of memory."""

    def no_memory(gradient: torch.Tensor) -> None:
        raise RuntimeError("no memory")

    forward(model).backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()

    def fail_behind(_module: Any, _inputs: Any, output: torch.Tensor) -> None:
        output.register_hook(no_memory)

    hook = model.causal_lm.model.layers[0].register_forward_hook(fail_behind)
    with pytest.raises(RuntimeError, match="no memory"):
        forward(model).backward()
    hook.remove()
    forward(model).backward()
    found = [p.grad for p in model.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_parts_of_the_model_run_on_the_copies(model):
    with whole_root(model, CPU):
        assert dtypes(model) == {torch.bfloat16}
    assert dtypes(model) == {torch.float32}
