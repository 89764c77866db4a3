"""A run whose base model is a GGUF file: trained, resumed, evaluated, and its final/ loaded."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_ray import ORPOConfig, ORPOTrainer, evaluate, train

pytest.importorskip("gguf", reason="needs the package gguf")
from tests.reference.gguf_file import TEXTS, write_gguf

PAIRS = [
    {"prompt": TEXTS[0], "chosen": TEXTS[1], "rejected": TEXTS[2]},
    {"prompt": TEXTS[0], "chosen": "twelve", "rejected": "i should think"},
]


@pytest.fixture(scope="module")
def folder(ray_cluster, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gguf")
    write_gguf(folder / "base.gguf", "Q8_0")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS))
    return folder


def config(folder: Path, name: str, **changes) -> ORPOConfig:
    values = {
        "model_name_or_path": str(folder / "base.gguf"),
        "train_files": str(folder / "pairs.jsonl"),
        "output_dir": str(folder / "runs"),
        "run_name": name,
        "global_batch_size": 2,
        "learning_rate": 1e-2,
        "max_steps": 2,
        "lr_scheduler_type": "constant",
    }
    return ORPOConfig(**values | changes)


def test_a_run_resumes_and_ends_in_an_ordinary_folder(folder, caplog):
    caplog.set_level(logging.INFO, "orpo_ray")
    train(config(folder, "whole"))
    assert "base.gguf (Q8_0) is dequantized to bfloat16" in caplog.text
    caplog.clear()
    result = train(config(folder, "whole", max_steps=4))
    assert "resum" in caplog.text
    final = Path(result.run_directory) / "final"
    model = AutoModelForCausalLM.from_pretrained(final)
    assert model.dtype == torch.bfloat16
    assert "gguf" not in (final / "config.json").read_text()
    (base,) = (folder / "runs" / "gguf").glob("base-*")
    before, after = (load_file(place / "model.safetensors") for place in (base, final))
    assert before.keys() == after.keys()
    assert not any(torch.equal(before[name], after[name]) for name in before)
    tokenizer = AutoTokenizer.from_pretrained(final)
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(base).chat_template
    assert (Path(result.run_directory) / "config.yaml").read_text().count("base.gguf") == 1


@pytest.mark.slow
def test_adapters_of_a_gguf_are_evaluated_against_it(folder):
    result = train(config(folder, "lora", lora_r=2))
    found = evaluate(
        config(
            folder,
            "compared",
            model_name_or_path=f"{result.run_directory}/final",
            baseline=str(folder / "base.gguf"),
            train_files=None,
            eval_files=str(folder / "pairs.jsonl"),
        )
    )
    assert found.sets["eval"].differences["log_odds"].value > 0


@pytest.mark.slow
def test_from_python_by_its_path(folder):
    trainer = ORPOTrainer(
        model=str(folder / "base.gguf"),
        args=ORPOConfig(output_dir=str(folder / "runs"), run_name="python", max_steps=1),
        train_dataset={name: [pair[name] for pair in PAIRS] for name in PAIRS[0]},
    )
    trainer.train()
    assert trainer.model.config.model_type == "llama"
    assert trainer.processing_class.eos_token == "<|eos|>"
