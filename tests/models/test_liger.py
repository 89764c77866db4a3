"""Liger's kernels: refused where they cannot run, the same numbers where they can."""

import gc
from importlib.util import find_spec

import pytest
import torch
from transformers.models.llama import modeling_llama

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.dataset.packing import pack
from orpo_ray.models.build import build_model
from orpo_ray.models.fused.liger import patch
from orpo_ray.models.microbatch import Microbatch
from orpo_ray.objective.head import LossScale
from orpo_ray.objective.objectives import orpo
from orpo_ray.pretrained import UnsupportedModelError
from tests.reference.models import odd_groups, tiny_model

needs_liger = pytest.mark.skipif(find_spec("liger_kernel") is None, reason="needs liger-kernel")


def refusal_on_a_cpu(folder: str) -> str:
    config = ORPOConfig(use_liger_kernel=True)
    with pytest.raises(UnsupportedModelError) as refusal:
        build_model(config, folder, torch.device("cpu"))
    return str(refusal.value)


def test_a_cpu_is_refused(run_ranks, inputs):
    (text,) = run_ranks(1, refusal_on_a_cpu, str(inputs / "model"))
    assert text.startswith("use_liger_kernel: Liger's kernels run on GPUs only")


@pytest.mark.skipif(find_spec("liger_kernel") is not None, reason="liger-kernel is installed")
def test_a_missing_package_is_named():
    with pytest.raises(UnsupportedModelError, match=r"pip install 'orpo_ray\[liger\]'"):
        patch(tiny_model("llama", torch.float32))


@needs_liger
def test_a_family_without_kernels_is_refused():
    with pytest.raises(UnsupportedModelError, match="Liger has no kernels for gpt_neox"):
        patch(tiny_model("gpt-neox", torch.float32))


@needs_liger
def test_only_this_model_is_patched():
    """Its norms and MLPs, and not the classes from which the next one is built."""
    patched = tiny_model("llama", torch.float32)
    patch(patched)
    layer = patched.model.layers[0]
    assert "Liger" in layer.mlp.forward.__func__.__qualname__
    assert "Liger" in layer.input_layernorm.forward.__func__.__qualname__
    assert "forward" not in vars(patched)  # the model's own, without Liger's fused losses
    other = tiny_model("llama", torch.float32).model.layers[0]
    assert "Liger" not in other.mlp.forward.__func__.__qualname__
    assert "Liger" not in type(other.input_layernorm).__name__


@needs_liger
def test_rotary_embeddings_are_the_familys_again_after_the_model():
    """That function belongs to the module, so to every model of the family in this process."""
    original = modeling_llama.apply_rotary_pos_emb
    patched = tiny_model("llama", torch.float32)
    patch(patched)
    assert modeling_llama.apply_rotary_pos_emb is not original
    del patched
    gc.collect()
    assert modeling_llama.apply_rotary_pos_emb is original


def both_ways(folder: str) -> list[list[torch.Tensor]]:
    """Sums and gradients of a row without and with Liger's kernels, in fp32 on this GPU."""
    device, results = torch.device("cuda"), []
    row = pack(odd_groups(1), 16, prompt_counts=True)
    for use in (False, True):
        config = ORPOConfig(use_liger_kernel=use, bf16=False)
        model = build_model(config, folder, device)
        output = model(Microbatch(row, device), LossScale(0.1, 0.1, orpo(1.0)))
        output.loss.backward()
        gradients = [p.grad.full_tensor().cpu() for p in model.parameters()]
        results.append([output.sums.cpu(), *gradients])
    return results


@pytest.mark.needs_gpu
@needs_liger
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_liger_computes_the_same(run_ranks, name, tmp_path):
    tiny_model(name, torch.float32).save_pretrained(tmp_path)
    ((plain, liger),) = run_ranks(1, both_ways, str(tmp_path), backend="nccl")
    largest = max(gradient.abs().max().item() for gradient in plain[1:])
    for expected, found in zip(plain, liger, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4 * largest)
