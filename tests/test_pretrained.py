"""Models and tokenizers that are not what they should be are refused by name, in one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from orpo_ray.pretrained import (
    ModelSource,
    UnsupportedModelError,
    load_model,
    load_model_config,
    load_tokenizer,
    refuse_unsafe,
)
from tests.reference.models import tiny_model


@pytest.fixture
def source(inputs: Path, tmp_path: Path) -> ModelSource:
    """The small model, in a folder to be changed."""
    shutil.copytree(inputs / "model", tmp_path / "model")
    return ModelSource(str(tmp_path / "model"), str(tmp_path / "model"))


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float32, "-inf"), (torch.float16, "inf"), (torch.bfloat16, "nan")]
)
def test_weights_that_are_not_finite_are_named(source, dtype, value):
    path = Path(source.model, "model.safetensors")
    weights = {name: weight.to(dtype) for name, weight in load_file(path).items()}
    for name in ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight"):
        weights[name].view(-1)[-1] = float(value)
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match="2 of the model's weights are not finite") as e:
        load_model(source, torch.float32)
    assert "q_proj" in str(e.value)
    assert "model.norm.weight" in str(e.value)


def test_weights_that_are_missing_are_named_where_they_are_read(source):
    path = Path(source.model, "model.safetensors")
    weights = {name: w for name, w in load_file(path).items() if "input_layernorm" not in name}
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"2 .* missing.*layers\.0\.input_layernorm"):
        load_model(source, torch.float32)


def test_experts_of_which_one_is_missing_are_refused(tmp_path):
    tiny_model("mixtral", torch.float32).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.0.block_sparse_moe.experts.1.w2.weight"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.mlp\.experts\.down_proj"):
        load_model(ModelSource(str(tmp_path), str(tmp_path)), torch.float32)


@pytest.mark.parametrize("named", ["weights.pkl", "../x.safetensors", "/tmp/x.safetensors", ""])
def test_an_index_names_safetensors_files_beside_it_only(source, named):
    path = Path(source.model)
    (path / "model.safetensors").rename(path / "model-1.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": named}}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    for reads in (refuse_unsafe, lambda source: load_model(source, torch.float32)):
        with pytest.raises(UnsupportedModelError, match="only safetensors files in the same"):
            reads(source)


def test_an_index_that_is_none_is_refused(source):
    path = Path(source.model)
    (path / "model.safetensors").unlink()
    for text in ("{", "[]", '{"weight_map": 3}'):
        (path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(UnsupportedModelError, match="is no index of weights"):
            refuse_unsafe(source)


@pytest.mark.parametrize(
    ("kept", "problem"),
    [
        ({}, r"holds no tokenizer \(tokenizer\.json\)"),
        ({"tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'}, "holds no tokenizer"),
        ({"tokenizer.json": "{"}, "its tokenizer cannot be loaded"),
        ({"tokenizer.json": '{"version": "1.0", "model": {"type": "New"}}'}, "cannot be loaded"),
    ],
    ids=["nothing", "a class only", "torn", "of another version"],
)
def test_a_tokenizer_that_cannot_be_loaded_is_refused(tmp_path, kept, problem):
    tiny_model("llama", torch.float32).save_pretrained(tmp_path)
    for name, text in kept.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(UnsupportedModelError, match=problem) as caught:
        load_tokenizer(ModelSource(str(tmp_path), str(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 5},
        {"model_type": "of-tomorrow"},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_config_that_cannot_be_loaded_is_refused(source, changes):
    path = Path(source.model, "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(UnsupportedModelError, match=r"its config\.json cannot be loaded") as caught:
        load_model_config(source)
    assert "\n" not in str(caught.value)
