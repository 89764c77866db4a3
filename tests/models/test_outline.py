"""A base model's weights and positions, judged by config and headers alone."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    CodeGenConfig,
    CTRLConfig,
    GPTJConfig,
    LlamaConfig,
    OPTConfig,
    PreTrainedConfig,
    RobertaConfig,
)

from orpo_ray.models.outline import Positions, outline, positions, unused_weights
from orpo_ray.pretrained import ModelSource, UnsupportedModelError, load_model
from tests.reference.models import tiny_model

FAMILIES = (
    *("llama", "llama-tied", "gpt2", "gpt-neox", "phi3", "gemma2", "gemma3", "gpt-oss", "lfm2"),
    *("mixtral", "olmoe", "qwen2-moe", "qwen3-moe", "smollm3"),
)


def save(folder: Path, family: str) -> ModelSource:
    tiny_model(family, torch.float32).save_pretrained(folder)
    return ModelSource(str(folder), str(folder))


def rewrite(source: ModelSource, change) -> None:
    """Write the weights anew, each under the name and with the value that `change` gives it."""
    path = Path(source.model, "model.safetensors")
    changed = dict(filter(None, (change(name, w) for name, w in load_file(path).items())))
    save_file({name: w.contiguous() for name, w in changed.items()}, path, {"format": "pt"})


def refusal(source: ModelSource) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        unused_weights(source, outline(source))
    text = str(caught.value)
    assert text.startswith(str(source.model))
    assert "\n" not in text
    return text


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_weights_are_accepted_and_missing_ones_are_named(family, tmp_path):
    source = save(tmp_path, family)
    assert unused_weights(source, outline(source)) == []
    lost = []

    def without_a_projection(name, weight):
        if "layers.1" in name or ".h.1." in name:
            if not lost and name.endswith(("down_proj.weight", "c_proj.weight", "w2.weight")):
                lost.append(name)
            if name in lost:
                return None
        return name, weight

    rewrite(source, without_a_projection)
    if lost:  # one of several experts, of which transformers makes one tensor, has another name
        assert ".1." in refusal(source)


def test_the_weight_that_a_tied_model_keeps_must_be_there(tmp_path):
    source = save(tmp_path, "llama-tied")
    rewrite(source, lambda name, w: None if "embed_tokens" in name else (name, w))
    assert "model.embed_tokens.weight" in refusal(source)


def test_names_without_the_prefix_of_the_decoder_are_accepted(tmp_path):
    """As GPT-2 itself is stored, with a buffer that transformers no longer has."""
    source = save(tmp_path, "gpt2")
    rewrite(source, lambda name, w: (name.removeprefix("transformer."), w))
    weights = load_file(tmp_path / "model.safetensors")
    weights["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert unused_weights(source, outline(source)) == []


def test_weights_that_the_model_lacks_are_given(tmp_path):
    source = save(tmp_path, "qwen2")
    weights = load_file(tmp_path / "model.safetensors")
    weights["v_head.summary.weight"] = torch.ones(1, 32)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert unused_weights(source, outline(source)) == ["v_head.summary.weight"]
    load_model(source, torch.float32)


def test_another_shape_is_refused_with_both(tmp_path):
    source = save(tmp_path, "llama")
    rewrite(source, lambda name, w: (name, w[:90] if name == "lm_head.weight" else w))
    text = refusal(source)
    assert "lm_head.weight is (90, 32), by config.json (96, 32)" in text
    with pytest.raises(UnsupportedModelError, match="have another shape than the model"):
        load_model(source, torch.float32)


def test_files_that_are_missing_or_damaged_are_named(tmp_path):
    source = save(tmp_path / "one", "llama")
    path = tmp_path / "one" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    assert "model.safetensors is damaged" in refusal(source)
    path.unlink()
    assert "has no model.safetensors" in refusal(source)
    parts = tmp_path / "parts"
    tiny_model("llama", torch.float32).save_pretrained(parts, max_shard_size="30KB")
    source = ModelSource(str(parts), str(parts))
    assert unused_weights(source, outline(source)) == []
    lost = sorted(parts.glob("*.safetensors"))[-1]
    lost.unlink()
    assert f"has no {lost.name}" in refusal(source)


def test_a_model_on_the_hub_or_quantized_is_left_to_the_workers(tmp_path):
    model = outline(save(tmp_path, "llama"))
    (tmp_path / "model.safetensors").unlink()
    assert unused_weights(ModelSource("someone/model", "someone/model"), model) == []
    model.config.quantization_config = {"quant_method": "fp8"}
    assert unused_weights(ModelSource(str(tmp_path), str(tmp_path)), model) == []


SMALL = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
N_HEADS = {"n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 40, "vocab_size": 96}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}


@pytest.mark.parametrize(
    ("config", "found"),
    [
        (OPTConfig(**SMALL, max_position_embeddings=64, ffn_dim=48, word_embed_proj_dim=32), 64),
        # Positions are counted from the row after the padding token's: 66 rows for 64.
        (RobertaConfig(**SMALL, max_position_embeddings=66, is_decoder=True), 64),
        (GPTJConfig(**N_HEADS, **ENDS, rotary_dim=4), 40),
        (CodeGenConfig(**N_HEADS, **ENDS), 40),
        (CTRLConfig(**N_HEADS, dff=48), 40),
    ],
    ids=["opt", "roberta", "gptj", "codegen", "ctrl"],
)
def test_positions_of_a_table_end_with_it(config: PreTrainedConfig, found: int):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert positions(model) == Positions(found, is_table=True)


LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("rope", "found"),
    [
        ({"rope_type": "default"}, 512),
        ({"rope_type": "linear", "factor": 4.0}, 2048),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}, 2048),
        # Configs with this type always have the scaled number.
        (
            {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 128}
            | LLAMA3,
            512,
        ),
    ],
    ids=["default", "linear", "yarn, scaled", "yarn, not scaled", "llama3"],
)
def test_positions_of_rope_are_those_that_it_is_scaled_to(rope: dict[str, Any], found: int):
    config = LlamaConfig(
        **SMALL,
        intermediate_size=48,
        max_position_embeddings=512,
        rope_parameters={"rope_theta": 1e4} | rope,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert positions(model) == Positions(found, is_table=False)


def test_alibi_has_no_limit():
    config = BloomConfig(vocab_size=96, hidden_size=32, n_layer=1, n_head=4)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert positions(model) is None
