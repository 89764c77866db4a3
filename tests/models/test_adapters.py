"""LoRA adapters under FSDP: trained, resumed, exported, merged, refused."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM

from orpo_ray.config.model import ModelSection
from orpo_ray.config.schema import ORPOConfig
from orpo_ray.models import build
from orpo_ray.models.adapters import add_adapters, base_of
from orpo_ray.pretrained import ModelSource, UnsupportedModelError, load_model
from orpo_ray.storage.relocation import base_record, find_base
from tests.reference.models import tiny_model
from tests.reference.small_run import metrics_without_times, train_small

LORA = {"lora_r": 4, "lora_alpha": 8.0, "max_steps": 10, "save_steps": 5, "logging_steps": 1}


@pytest.fixture(scope="module")
def adapted(run_ranks, inputs, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("adapted")
    run_ranks(2, train_small, inputs, run, LORA)
    return run


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(2, 40)[None]).logits


def test_the_adapter_is_exported_and_only_it_was_trained(inputs, adapted):
    """Peft's own loader puts it on the base model; each adapted layer has moved."""
    assert not (adapted / "final" / "model.safetensors").exists()
    base = AutoModelForCausalLM.from_pretrained(inputs / "model")
    before = logits(base)
    model = peft.PeftModel.from_pretrained(base, adapted / "final")
    assert model.peft_config["default"].r == 4
    moved = [n for n, p in model.named_parameters() if "lora_B" in n and bool(p.any())]
    assert len(moved) == 2 * 7  # layers x (q, k, v, o, gate, up, down)
    assert (logits(model) - before).abs().max() > 1e-2
    lines = metrics_without_times(adapted)
    assert lines[-1]["eval_loss"] < lines[0]["eval_loss"] - 0.02


def test_base_and_adapter_can_move_together_and_a_lost_base_is_said(inputs, adapted, tmp_path):
    """In place peft finds the base by itself; elsewhere this project does, and says what to set.

    Moved as they lay to each other, the base under another name; then the adapter beside the base.
    """
    final = adapted / "final"
    in_place = logits(peft.AutoPeftModelForCausalLM.from_pretrained(final))
    named = json.loads((final / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(named) == inputs / "model"
    between = os.path.relpath(inputs / "model", final)
    (tmp_path / "elsewhere" / "a" / "b" / "c").mkdir(parents=True)
    pairs = [(tmp_path / "elsewhere" / "a" / "b" / "c" / "final", between)]
    pairs.append((tmp_path / "beside" / "adapter", "../model"))
    for folder, to_base in pairs:
        shutil.copytree(final, folder)
        config = folder / "adapter_config.json"
        config.write_text(config.read_text().replace(named, "/gone/model"))
        with pytest.raises(
            UnsupportedModelError, match=r"base model is not there: /gone/model; put"
        ):
            load_model(ModelSource(str(folder), str(folder)), torch.float32)
        base = Path(os.path.normpath(folder / to_base))
        shutil.copytree(inputs / "model", base)
        model = load_model(ModelSource(str(folder), str(folder)), torch.float32)
        torch.testing.assert_close(logits(model), in_place)
        assert base_of(ModelSource(str(folder), str(folder)))[0].model == str(base)


def test_a_hub_id_stays_the_name_of_a_base(tmp_path):
    assert find_base("org/model", tmp_path) == "org/model"
    assert base_record("org/model", tmp_path) == {}


def test_a_checkpoint_holds_the_adapter_and_not_the_base(adapted):
    reader = FileSystemReader(adapted / "checkpoints" / "step-00000010")
    names = [n for n in reader.read_metadata().state_dict_metadata if n.startswith("model.")]
    assert len(names) == 2 * 2 * 7  # A and B of every adapted layer
    assert all(".lora_" in name for name in names)


def test_one_worker_equals_two(run_ranks, inputs, adapted, tmp_path):
    run_ranks(1, train_small, inputs, tmp_path, LORA)
    for one, two in zip(
        metrics_without_times(tmp_path), metrics_without_times(adapted), strict=True
    ):
        assert one == pytest.approx(two, rel=1e-5, abs=1e-6)


def test_a_resumed_run_ends_byte_identical_and_merges(run_ranks, inputs, adapted, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(adapted, run)
    shutil.rmtree(run / "final")
    shutil.rmtree(run / "checkpoints" / "step-00000010")
    run_ranks(2, train_small, inputs, run, LORA, new_processes=True)
    name = "final/adapter_model.safetensors"
    assert (run / name).read_bytes() == (adapted / name).read_bytes()
    assert metrics_without_times(run) == metrics_without_times(adapted)
    shutil.rmtree(run / "final")
    run_ranks(2, train_small, inputs, run, LORA | {"merge_adapter": True})
    merged = AutoModelForCausalLM.from_pretrained(run / "final")
    base = AutoModelForCausalLM.from_pretrained(inputs / "model")
    apart = peft.PeftModel.from_pretrained(base, adapted / "final")
    torch.testing.assert_close(logits(merged), logits(apart), rtol=1e-4, atol=1e-4)


def train_on_fp32_weights(inputs: Path, run: Path, settings: dict[str, Any]) -> None:
    """As `train_small`, with frozen weights in the type of others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "narrow_frozen", lambda causal_lm: None)
        train_small(inputs, run, settings)


def test_frozen_weights_in_bfloat16_change_no_bit_of_what_is_trained(run_ranks, inputs, tmp_path):
    settings = LORA | {"bf16": True, "max_steps": 3, "save_steps": None, "evaluate": False}
    for train in (train_small, train_on_fp32_weights):
        run_ranks(2, train, inputs, tmp_path / train.__name__, settings)
    name = "final/adapter_model.safetensors"
    here, there = (
        load_file(tmp_path / train / name) for train in ("train_small", "train_on_fp32_weights")
    )
    assert {tensor.dtype for tensor in here.values()} == {torch.float32}
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_below_adapters_weights_are_in_the_type_of_computation(run_ranks, inputs):
    assert run_ranks(1, types_of_weights, inputs, LORA | {"bf16": True}) == [
        {True: torch.float32, False: torch.bfloat16}
    ]
    assert run_ranks(1, types_of_weights, inputs, LORA | {"bf16": False}) == [
        {True: torch.float32, False: torch.float32}
    ]


def types_of_weights(inputs: Path, settings: dict[str, Any]) -> dict[bool, torch.dtype]:
    """By whether they are trained."""
    config = ORPOConfig(**settings)
    model = build.build_model(config, str(inputs / "model"), torch.device("cpu"))
    return {p.requires_grad: p.dtype for p in model.parameters()}


def test_targets_that_cannot_be_adapted_are_refused():
    model = tiny_model("llama", torch.float32)
    with pytest.raises(UnsupportedModelError, match=r"lora_target_modules: .*no_such_layer"):
        add_adapters(model, ModelSection(lora_r=2, lora_target_modules=("no_such_layer",)), 0)
    # peft itself passes over a name as long as another one is of a module.
    with pytest.raises(
        UnsupportedModelError, match="'q_prj' is no module of llama; did you mean q_proj"
    ):
        add_adapters(model, ModelSection(lora_r=2, lora_target_modules=("v_proj", "q_prj")), 0)
    with pytest.raises(UnsupportedModelError, match="the LM head cannot be adapted"):
        add_adapters(model, ModelSection(lora_r=2, lora_target_modules=("lm_head",)), 0)
