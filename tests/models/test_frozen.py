"""Weights that a run leaves as they are."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.models.build import freeze
from orpo_ray.pretrained import UnsupportedModelError
from tests.reference.small_run import train_small

FROZEN = ("model.embed_tokens", "model.layers.0.self_attn.q_proj.weight")


@pytest.mark.parametrize("world_size", [1, 2])
def test_frozen_weights_are_the_same_after_training(run_ranks, inputs, tmp_path, world_size):
    """The embedding is tied to the head; all other weights change."""
    run = tmp_path / "run"
    few = {"max_steps": 2, "frozen_weights": FROZEN, "evaluate": False}
    run_ranks(world_size, train_small, inputs, run, few)
    before = load_file(inputs / "model" / "model.safetensors")
    after = load_file(run / "final" / "model.safetensors")
    same = {name for name, weight in after.items() if torch.equal(weight, before[name])}
    assert same == {"model.embed_tokens.weight", FROZEN[1]}


def test_a_run_with_frozen_weights_resumes_to_the_same_bytes(run_ranks, inputs, tmp_path):
    few = {"frozen_weights": FROZEN, "evaluate": False, "lr_scheduler_type": "constant"}
    for name, steps in (("whole", (4,)), ("parts", (2, 4))):
        for n in steps:
            run_ranks(1, train_small, inputs, tmp_path / name, few | {"max_steps": n})
    whole, parts = (tmp_path / name / "final/model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (("model.layer.0",), "the model has no model.layer.0"),
        (("model", "lm_head"), "no weight is"),
    ],
)
def test_names_that_freeze_nothing_or_all(inputs: Path, names, said):
    model = AutoModelForCausalLM.from_pretrained(inputs / "model")
    with pytest.raises(UnsupportedModelError, match=f"frozen_weights: {said}"):
        freeze(model, names)


def test_with_adapters_there_is_nothing_to_freeze():
    with pytest.raises(ConfigError, match="with lora_r all weights are frozen but the adapters'"):
        ORPOConfig(lora_r=4, frozen_weights=("model",))
