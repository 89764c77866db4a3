"""Models in memory as users have them: what a run keeps of them, and what `final/` has."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from orpo_ray.orchestration.trainer.memory import KeptInputs
from orpo_ray.storage.folder import Folder
from tests.reference.small_run import VOCABULARY, train_small


@pytest.mark.parametrize("in_shards", [False, True])
def test_a_model_comes_out_as_it_went_in(run_ranks, inputs, tmp_path, in_shards):
    """In bfloat16, tied, with more rows than tokens, over several files, and how it generates."""
    model = LlamaForCausalLM.from_pretrained(inputs / "model", dtype=torch.bfloat16)
    model.resize_token_embeddings(VOCABULARY + 8)
    model.generation_config.update(do_sample=True, temperature=0.7)
    if in_shards:
        model.save_pretrained(tmp_path / "model", max_shard_size="20KB")
        assert len(list((tmp_path / "model").glob("*.safetensors"))) > 1
    else:
        KeptInputs(Folder.at(tmp_path)).model(model)
    shutil.copytree(inputs / "tokens", tmp_path / "tokens")
    for file in (inputs / "model").glob("token*"):
        shutil.copy(file, tmp_path / "model")
    run = tmp_path / "run"
    run_ranks(2, train_small, tmp_path, run, {"max_steps": 2, "evaluate": False})
    final = AutoModelForCausalLM.from_pretrained(run / "final", dtype="auto")
    assert final.dtype == torch.bfloat16
    assert final.get_input_embeddings().weight.shape[0] == VOCABULARY + 8
    assert final.lm_head.weight.data_ptr() == final.get_input_embeddings().weight.data_ptr()
    assert (final.generation_config.do_sample, final.generation_config.temperature) == (True, 0.7)
    assert not same(final, model)


def same(one: torch.nn.Module, other: torch.nn.Module) -> list[str]:
    """The names of weights that are equal."""
    others = other.state_dict()
    return [name for name, weight in one.state_dict().items() if torch.equal(weight, others[name])]
