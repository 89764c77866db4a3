"""QLoRA: refused where it cannot run; adapters on a base in 4 bits, trained and exported."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.dataset.packing import pack
from orpo_ray.models.build import build_model, build_quantized
from orpo_ray.models.export import export_model
from orpo_ray.models.microbatch import Microbatch
from orpo_ray.models.quantized import quantized_text
from orpo_ray.objective.head import LossScale
from orpo_ray.objective.objectives import orpo
from orpo_ray.pretrained import ModelSource, UnsupportedModelError, load_model_config
from orpo_ray.training.flops import Work
from tests.reference.models import odd_groups

QLORA = {"load_in_4bit": True, "lora_r": 4, "bf16": False}
LAYERS = 2 * 7  # layers x (q, k, v, o, gate, up, down)
needs_bitsandbytes = pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="needs bitsandbytes"
)


def test_weights_in_4_bits_want_adapters():
    with pytest.raises(ConfigError, match="load_in_4bit: weights in 4 bits are not trained"):
        ORPOConfig(load_in_4bit=True)
    assert ORPOConfig(load_in_4bit=True, lora_r=4).model.load_in_4bit


def refusal(folder: str) -> str:
    with pytest.raises(UnsupportedModelError) as found:
        build_model(ORPOConfig(**QLORA), folder, torch.device("cpu"))
    return str(found.value)


def test_a_cpu_is_refused(run_ranks, inputs):
    (text,) = run_ranks(1, refusal, str(inputs / "model"))
    assert text.startswith("load_in_4bit: 4-bit weights are multiplied on GPUs only")


def trained(folder: Path, run: Path, device_type: str) -> dict[str, Any]:
    """One update of adapters by hand, exported; what of the model is how, on this rank."""
    device = torch.device(device_type)
    config = ORPOConfig(**QLORA, learning_rate=0.1)
    path = str(folder / "model")
    source = ModelSource(path, path)
    model = build_quantized(config, source, load_model_config(source), device)
    row = pack(odd_groups(1), 16, prompt_counts=True)
    output = model(Microbatch(row, device), LossScale(0.1, 0.1, orpo(1.0)))
    output.loss.backward()
    adapters = [p for p in model.parameters() if p.requires_grad]
    torch.optim.SGD(adapters, lr=0.1).step()
    export_model(str(run / "final"), model, source, config.model, step=1)
    frozen = StateDictOptions(ignore_frozen_params=True, strict=False)
    return {
        "loss": output.loss.item(),
        "sharded": sum(isinstance(p, DTensor) for p in model.parameters()),
        "adapters": len(adapters),
        "in 4 bits": sum(type(p).__name__ == "Params4bit" for p in model.parameters()),
        "head": type(model.causal_lm.lm_head) is nn.Linear,
        "saved": sorted(get_model_state_dict(model, options=frozen)),
        "without gradient": sum(p.grad is None for p in adapters),
        "said": quantized_text(model),
        "work": Work.from_model(model.causal_lm).per_token,
        "rank": dist.get_rank(),
    }


def mind(found: dict[str, Any], plain: float) -> None:
    """The base is in 4 bits and whole, the adapters are sharded and all that is saved."""
    assert found["in 4 bits"] == LAYERS
    assert found["head"]
    assert found["adapters"] == found["sharded"] == 2 * LAYERS
    assert found["without gradient"] == 0
    # The tied head has a second name, which checkpoints leave out themselves.
    beside = {name for name in found["saved"] if ".lora_" not in name}
    assert beside <= {"causal_lm.lm_head.weight"}
    # A weight is off by some percent of its block's largest; this says only that it is the model.
    assert found["loss"] == pytest.approx(plain, rel=0.02)
    assert found["loss"] != plain


def plain_loss(folder: Path) -> float:
    model = build_model(ORPOConfig(bf16=False), str(folder / "model"), torch.device("cpu"))
    row = pack(odd_groups(1), 16, prompt_counts=True)
    return model(Microbatch(row, torch.device("cpu")), LossScale(0.1, 0.1, orpo(1.0))).loss.item()


@needs_bitsandbytes
def test_adapters_are_trained_on_a_base_in_4_bits(run_ranks, inputs, tmp_path):
    """On two ranks, by the slow way that bitsandbytes has for CPUs; peft reads the adapter."""
    first, second = run_ranks(2, trained, inputs, tmp_path, "cpu")
    (plain,) = run_ranks(1, plain_loss, inputs)
    mind(first, plain)
    assert {k: v for k, v in first.items() if k != "rank"} == {
        k: v for k, v in second.items() if k != "rank"
    }
    base = AutoModelForCausalLM.from_pretrained(inputs / "model")
    n_base = sum(p.numel() for p in base.parameters())
    adapted = peft.PeftModel.from_pretrained(base, tmp_path / "final")
    moved = [n for n, p in adapted.named_parameters() if "lora_B" in n and bool(p.any())]
    assert len(moved) == LAYERS
    sizes = {n: p.numel() for n, p in adapted.named_parameters() if ".layers." in n and p.dim() > 1}
    trained_sizes = sum(size for name, size in sizes.items() if ".lora_" in name)
    said = (
        f" {sum(sizes.values()) - trained_sizes:,} of the base's {n_base:,} weights are in 4 bits"
    )
    assert first["said"].endswith(said)
    # Two weights of 4 bits lie in a byte; each is multiplied all the same.
    assert first["work"] == 4 * sum(sizes.values()) + 2 * trained_sizes


@pytest.mark.needs_gpu
@needs_bitsandbytes
def test_a_gpu_trains_on_a_base_in_4_bits(run_ranks, inputs, tmp_path):
    (found,) = run_ranks(1, trained, inputs, tmp_path, "cuda", backend="nccl")
    (plain,) = run_ranks(1, plain_loss, inputs)
    mind(found, plain)
