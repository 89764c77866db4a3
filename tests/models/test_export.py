"""What is exported stops where answers were trained to end; with transformers' `generate`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_ray.models.export import _with_end
from tests.families.training import tiny_family
from tests.reference.small_run import train_small

END = 1  # of the small run's tokenizer; its model's config has transformers' default, 2
SHORT = {"max_steps": 2, "save_steps": 2, "evaluate": False, "sample_prompts": 0}
SAMPLING = {"eos_token_id": [5, 7], "pad_token_id": 9, "do_sample": True, "temperature": 0.6}


@pytest.fixture(scope="module")
def with_sampling(inputs: Path, tmp_path_factory) -> Path:
    """The inputs of the small run with a base model that has a `generation_config.json`."""
    folder = tmp_path_factory.mktemp("with_sampling") / "inputs"
    shutil.copytree(inputs, folder)
    (folder / "model" / "generation_config.json").write_text(json.dumps(SAMPLING))
    return folder


def n_generated(folder: Path, token: int, **options: Any) -> int:
    """Tokens that a model generates of which the most likely is always the same."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    head = torch.nn.Linear(model.config.hidden_size, model.config.vocab_size).requires_grad_(False)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)[token] = 100.0
    model.lm_head = head
    prompt = torch.tensor([[3, 4, 8]])
    mask = torch.ones_like(prompt)
    out = model.generate(prompt, attention_mask=mask, max_new_tokens=6, do_sample=False, **options)
    return out.shape[1] - prompt.shape[1]


def eos_of(folder: Path) -> tuple[Any, Any]:
    names = ("generation_config.json", "config.json")
    found = [json.loads((folder / name).read_text())["eos_token_id"] for name in names]
    return found[0], found[1]


def test_generation_stops_at_the_trained_end(run_ranks, inputs, tmp_path):
    run_ranks(1, train_small, inputs, tmp_path, SHORT)
    final = tmp_path / "final"
    assert AutoTokenizer.from_pretrained(final).eos_token_id == END
    assert eos_of(final) == ([END, 2], [END, 2])
    assert n_generated(inputs / "model", END, pad_token_id=0) == 6  # the base model does not
    assert n_generated(final, END, pad_token_id=0) == 1
    assert n_generated(final, 2, pad_token_id=0) == 1
    assert n_generated(final, 3, pad_token_id=0) == 6


def test_the_base_models_sampling_settings_and_ends_are_kept(run_ranks, with_sampling, tmp_path):
    run_ranks(1, train_small, with_sampling, tmp_path, SHORT)
    exported = json.loads((tmp_path / "final" / "generation_config.json").read_text())
    assert exported == SAMPLING | {"eos_token_id": [END, 5, 7]}
    assert eos_of(tmp_path / "final")[1] == [END, 2]


def test_parts_in_fp32_of_a_model_in_bfloat16_are_kept(run_ranks, inputs, tmp_path):
    """ERNIE's gates: trained for two steps at rate 0, nothing changes, not by rounding either."""
    folder = tmp_path / "inputs"
    shutil.copytree(inputs, folder)
    (folder / "model" / "model.safetensors").unlink()
    model = tiny_family("ernie4_5_moe")
    gates = {name: weight for name, weight in model.state_dict().items() if "gate.weight" in name}
    assert gates
    model.to(torch.bfloat16)
    model.load_state_dict({n: w.float() for n, w in gates.items()}, strict=False, assign=True)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder / "model")
    run_ranks(1, train_small, folder, tmp_path / "run", SHORT | {"learning_rate": 0.0})
    base, final = (
        AutoModelForCausalLM.from_pretrained(path, dtype="auto").state_dict()
        for path in (folder / "model", tmp_path / "run" / "final")
    )
    assert {weight.dtype for weight in base.values()} == {torch.bfloat16, torch.float32}
    for name, weight in base.items():
        assert torch.equal(final[name], weight), name
    for name, gate in gates.items():
        assert torch.equal(final[name], gate), name


@pytest.mark.parametrize("merged", [True, False])
def test_a_merged_export_stops_and_adapters_alone_do_not_say(
    run_ranks, with_sampling, tmp_path, merged
):
    lora = {"lora_r": 2, "merge_adapter": merged}
    run_ranks(1, train_small, with_sampling, tmp_path, SHORT | lora)
    written = {path.name for path in (tmp_path / "final").iterdir()}
    assert ("generation_config.json" in written) == merged
    assert ("config.json" in written) == merged
    if merged:
        exported = json.loads((tmp_path / "final" / "generation_config.json").read_text())
        assert exported == SAMPLING | {"eos_token_id": [END, 5, 7]}


@pytest.mark.parametrize(
    ("own", "ends"),
    [(None, 4), (4, 4), (0, [4, 0]), ([0, 4], [0, 4]), ([0, 2], [4, 0, 2]), ([], 4)],
)
def test_an_end_that_the_model_has_is_not_added(own, ends):
    assert _with_end(4, own) == ends
