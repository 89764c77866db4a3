"""Answers of a sharded model of every family, against its whole forward pass on one device."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.models.build import build_model
from orpo_ray.training.samples import SamplePrompt, Sampler
from tests.reference.models import VOCABULARY, tiny_model

# Sliding windows, capped scores, learned positions, convolutions, sinks, experts.
FAMILIES = ("llama-tied", "mistral", "gemma2", "gpt2", "gpt-neox", "lfm2", "gpt-oss", "mixtral")
PROMPTS = ((5, 9, 3), (7, 8, 30, 41, 2, 6, 11, 12, 13, 14, 15), (22,))
END, N_NEW = 1, 12


def write_models(folder: Path) -> None:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{END}")
    for name in FAMILIES:
        model = tiny_model(name, torch.float32)
        model.config.get_text_config().eos_token_id = None
        model.generation_config.eos_token_id = None
        model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / "tokenizer")


def answers(folder: Path, bf16: bool) -> dict[str, list[str]]:
    """What this rank's share of every model says."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    sampler = Sampler(tuple(SamplePrompt(ids, "") for ids in PROMPTS), tokenizer, N_NEW)
    config, device = ORPOConfig(bf16=bf16), torch.device("cpu")
    return {
        name: sampler.answer(build_model(config, str(folder / name), device), device)
        for name in FAMILIES
    }


def greedy(folder: Path, prompt: tuple[int, ...]) -> list[int]:
    """One whole forward pass a token, with nothing cached and nothing padded."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = list(prompt)
    while len(ids) < len(prompt) + N_NEW and ids[-1] != END:
        with torch.no_grad():
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    return [token for token in ids[len(prompt) :] if token != END]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


def test_every_family_answers_sharded_as_it_does_whole(run_ranks, folder):
    """Prompts of three lengths at a time; both ranks say the same."""
    one, two = run_ranks(2, answers, folder, False)
    assert one == two
    for name in FAMILIES:
        expected = [greedy(folder / name, prompt) for prompt in PROMPTS]
        assert [[int(w[1:]) for w in text.split()] for text in one[name]] == expected, name


def test_answers_in_bfloat16(run_ranks, folder):
    """Rounding decides between near answers, so only that there are some, and the same."""
    one, two = run_ranks(2, answers, folder, True)
    assert one == two
    assert all(text.split() for texts in one.values() for text in texts)
