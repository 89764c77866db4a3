"""A base model that is stored quantized: refused for training, and evaluated where it can be."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, FineGrainedFP8Config

from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.demo.model import make_demo_model
from orpo_ray.models.outline import outline, unused_weights
from orpo_ray.models.quantized import refuse_unreadable
from orpo_ray.orchestration.inputs import find_inputs
from orpo_ray.orchestration.preflight import check_model
from orpo_ray.preference.errors import DataError
from orpo_ray.pretrained import ModelSource, UnsupportedModelError

IN_4_BITS = "set load_in_4bit=true and lora_r"
BLOCK = 16
FP8 = {"quant_method": "fp8", "weight_block_size": [BLOCK, BLOCK], "activation_scheme": "dynamic"}


@pytest.fixture
def folder(tmp_path):
    make_demo_model(str(tmp_path / "model"), ["hello"] * 9, 1)
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    return tmp_path


def quantize(folder, config, key="quantization_config", inside=None):
    """Say in config.json that the model is stored quantized."""
    file = folder / "model" / "config.json"
    values = json.loads(file.read_text())
    place = values if inside is None else values.setdefault(inside, {})
    place[key] = config
    file.write_text(json.dumps(values))


def inputs(folder, model="model", only_evals=False):
    config = ORPOConfig(
        model_name_or_path=str(folder / model),
        train_files=str(folder / "pairs.jsonl"),
        eval_files=str(folder / "pairs.jsonl"),
        output_dir=str(folder / "runs"),
    )
    return find_inputs(config, config.output.output_dir, only_evals)


@pytest.mark.parametrize(
    ("config", "named", "advice"),
    [
        ({"quant_method": "gptq", "bits": 4}, "(gptq)", IN_4_BITS),
        ({"quant_method": "awq", "bits": 4, "version": "gemm"}, "(awq)", IN_4_BITS),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "(bitsandbytes)", IN_4_BITS),
        (FP8, "(fp8)", "quantization_config=FineGrainedFP8Config(dequantize=True)"),
        ({"quant_method": "mxfp4"}, "(mxfp4)", "quantization_config=Mxfp4Config(dequantize=True)"),
        ({"quant_method": "modelopt"}, "(modelopt)", "name the model that it was quantized from"),
        ({"bits": 2}, "(by a method that its config.json does not name)", "quantized from"),
    ],
)
def test_what_is_stored_quantized_is_not_trained(folder, config, named, advice):
    quantize(folder, config)
    with pytest.raises(DataError) as found:
        inputs(folder)
    (line,) = found.value.lines
    assert line.startswith(f"model_name_or_path: {folder}/model is stored quantized {named}")
    assert "such weights are not trained: name the model" in line
    assert advice in line
    assert ("save_original_format=False" in line) == ("dequantize=True" in line)
    assert inputs(folder, only_evals=True).model.model == str(folder / "model")


@pytest.mark.parametrize(
    ("key", "inside"), [("compression_config", None), ("quantization_config", "text_config")]
)
def test_other_places_of_the_same_setting(folder, key, inside):
    quantize(folder, {"quant_method": "compressed-tensors"}, key, inside)
    with pytest.raises(DataError, match=r"CompressedTensorsConfig\(dequantize=True\)"):
        inputs(folder)


def test_a_model_that_is_not_quantized_is_trained(folder):
    quantize(folder, None)
    assert inputs(folder).model.model == str(folder / "model")


def test_the_advice_for_fp8_gives_a_model_that_is_trained(folder):
    """Stored in fp8 with a scale a block, as DeepSeek's; dequantized as the refusal says."""
    path = folder / "model"
    plain = load_file(path / "model.safetensors")
    stored = dict(plain)
    for name in [name for name in plain if "_proj." in name]:
        rows, columns = (n // BLOCK for n in plain[name].shape)
        blocks = plain[name].reshape(rows, BLOCK, columns, BLOCK)
        scales = blocks.abs().amax(dim=(1, 3)) / torch.finfo(torch.float8_e4m3fn).max
        scaled = (blocks / scales[:, None, :, None]).reshape(plain[name].shape)
        stored[name] = scaled.to(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = scales
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    quantize(folder, FP8)
    with pytest.raises(DataError, match="stored quantized"):
        inputs(folder)
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=FineGrainedFP8Config(dequantize=True), dtype=torch.float32
    )
    # Without the option the weights are in fp8 again, and config.json does not say so.
    model.save_pretrained(folder / "again")
    again = ModelSource(str(folder / "again"), "")
    with pytest.raises(UnsupportedModelError, match="weights are stored in 8 bits"):
        unused_weights(again, outline(again))
    model.save_pretrained(folder / "whole", save_original_format=False)
    for file in path.glob("tokenizer*"):
        (folder / "whole" / file.name).write_bytes(file.read_bytes())
    whole = inputs(folder, "whole").model
    assert unused_weights(whole, outline(whole)) == []
    for name, weight in load_file(folder / "whole" / "model.safetensors").items():
        # 3 bits of mantissa: half of 1/8 at most, and as much of a block's largest near zero.
        assert (weight - plain[name]).abs().max() <= plain[name].abs().max() / 16 + 1e-6, name


def test_an_evaluation_names_the_package_that_is_missing(folder):
    quantize(folder, {"quant_method": "aqlm", "in_group_size": 8})
    model_config = AutoConfig.from_pretrained(folder / "model")
    with pytest.raises(UnsupportedModelError) as found:
        refuse_unreadable("m", model_config, on_gpu=False)
    assert str(found.value).startswith("m is stored quantized and cannot be loaded: ")
    assert "aqlm" in str(found.value)
    quantize(folder, {"quant_method": "of-next-year"})
    model_config = AutoConfig.from_pretrained(folder / "model")
    with pytest.raises(UnsupportedModelError, match="Unknown quantization type, got of-next-year"):
        refuse_unreadable("m", model_config, on_gpu=False)
    quantize(folder, FP8)  # which CPUs compute dequantized
    refuse_unreadable("m", AutoConfig.from_pretrained(folder / "model"), on_gpu=False)


def test_an_evaluation_is_refused_before_workers_start(folder):
    quantize(folder, {"quant_method": "of-next-year"})
    source = inputs(folder, only_evals=True).model
    with pytest.raises(ConfigError) as found:
        check_model(ORPOConfig(use_gpu=False), source, {})
    (line,) = found.value.lines
    assert line.startswith(f"model_name_or_path: {folder}/model is stored quantized and cannot be")
