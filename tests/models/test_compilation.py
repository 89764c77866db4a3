"""Which models are compiled where nothing is set."""

from typing import Any

import pytest
import torch

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.models.fused import compilation
from orpo_ray.models.fused.compilation import is_compiled
from orpo_ray.models.orpo_model import OrpoModel
from tests.reference.models import tiny_model

GPU, CPU = torch.device("cuda"), torch.device("cpu")


def compiled(
    family: str = "llama",
    device: torch.device = GPU,
    kernel: str = "varlen",
    unsharded: bool = True,
    **settings: Any,
) -> bool:
    model = OrpoModel(tiny_model(family, torch.float32), "packed", None, kernel)
    return is_compiled(model, device, ORPOConfig(**settings), unsharded)


@pytest.fixture(autouse=True)
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU, whose torch comes with it."""
    monkeypatch.setattr(compilation, "find_spec", lambda name: name == "triton" or None)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "mistral", "qwen3", "phi3", "gpt2"])
def test_plain_decoders_are_compiled_on_one_gpu(family):
    assert compiled(family)
    assert not compiled(family, CPU)
    assert not compiled(family, unsharded=False)
    assert not compiled(family, torch_compile=False)
    assert compiled(family, CPU, torch_compile=True)


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe", "lfm2", "falcon"])
def test_others_are_compiled_where_that_is_set(family):
    assert not compiled(family)
    assert compiled(family, torch_compile=True)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_r": 4},
        {"full_determinism": True},
        {"use_liger_kernel": True},
        {"kernel": "flex"},
    ],
    ids=str,
)
def test_settings_that_speak_against_it(settings):
    assert not compiled(**settings)


def test_nothing_is_compiled_without_a_compiler(monkeypatch):
    monkeypatch.setattr(compilation, "find_spec", lambda name: None)
    assert not compiled()


def test_nothing_is_compiled_for_an_evaluation():
    model = OrpoModel(tiny_model("llama", torch.float32), "packed", None, "varlen")
    model.requires_grad_(False)
    assert not is_compiled(model, GPU, ORPOConfig(), True)
