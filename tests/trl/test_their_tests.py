"""TRL's own ORPO tests with our import: tests/experimental/test_orpo_trainer.py of TRL 1.16.

Data and models are local. The test functions here have the names of theirs; these are left out:

- `test_orpo_trainer[t5]`: an encoder-decoder; `test_encoder_decoders_are_refused` is in its place.
- `test_train_model_dtype`: float16 weights; master weights are float32 here, and float16 is refused
  in `test_values_that_are_refused` of `test_names.py`.
- `test_trust_remote_code`, its second half: code of a model runs where `model_revision` pins it.
- `test_tag_added`, the tag `trl`: the model is trained without TRL.
"""

import json
import shutil
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from orpo_ray import ConfigError, ORPOConfig, ORPOTrainer
from orpo_ray.demo.model import make_demo_model
from tests.trl.pairs import LAYOUTS, dataset

FEW = {"per_device_train_batch_size": 2, "max_steps": 3, "remove_unused_columns": False}
Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A folder with a small model and its tokenizer."""
    folder = str(tmp_path_factory.mktemp("base"))
    make_demo_model(folder, ["What color is number 1? It is red."], 1)
    return folder


@pytest.fixture
def model(base: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype="float32")


@pytest.fixture
def tokenizer(base: str) -> Any:
    loaded = AutoTokenizer.from_pretrained(base)
    loaded.pad_token = loaded.eos_token
    return loaded


def weights(trainer: ORPOTrainer) -> Weights:
    return {name: weight.clone() for name, weight in trainer.model.named_parameters()}


def assert_changed(before: Weights, trainer: ORPOTrainer, part: str = "") -> None:
    """Every weight of which the name has the part is another."""
    same = [
        name
        for name, weight in before.items()
        if part in name
        and weight.sum() != 0
        and torch.equal(weight, trainer.model.get_parameter(name))
    ]
    assert same == []
    assert trainer.state.log_history[-1]["train_loss"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["standard_preference", "conversational_preference"])
def test_orpo_trainer(ray_cluster, model, tokenizer, tmp_path, layout):
    args = ORPOConfig(
        output_dir=tmp_path,
        gradient_accumulation_steps=1,
        learning_rate=9e-1,
        eval_strategy="steps",
        beta=0.1,
        report_to="none",
        **FEW,
    )
    data = dataset(layout)
    trainer = ORPOTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=data["train"],
        eval_dataset=data["test"],
    )
    before = weights(trainer)
    trainer.train()
    assert_changed(before, trainer)


def test_encoder_decoders_are_refused(tokenizer, tmp_path):
    small = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=len(tokenizer), **small))
    with pytest.raises(ConfigError, match="is_encoder_decoder: not taken; only decoders"):
        ORPOConfig(output_dir=tmp_path, is_encoder_decoder=True)
    with pytest.raises(ConfigError, match="model: an encoder-decoder"):
        ORPOTrainer(t5, ORPOConfig(tmp_path), None, dataset()["train"], None, tokenizer)


@pytest.mark.slow
def test_orpo_trainer_processing_class_autoloaded(ray_cluster, model, tmp_path):
    args = ORPOConfig(output_dir=tmp_path, beta=0.1, report_to="none", **FEW)
    trainer = ORPOTrainer(model=model, args=args, train_dataset=dataset()["train"])
    assert trainer.processing_class is not None
    trainer.train()
    assert trainer.state.log_history[-1]["train_loss"] is not None


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_orpo_trainer_with_lora(ray_cluster, model, tokenizer, tmp_path, layout):
    """As with TRL, `trainer.model` has adapters from the beginning."""
    data = dataset(layout)
    args = ORPOConfig(
        output_dir=tmp_path,
        gradient_accumulation_steps=4,
        learning_rate=9e-1,
        eval_strategy="steps",
        beta=0.1,
        report_to="none",
        **FEW,
    )
    trainer = ORPOTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        peft_config=LoraConfig(
            r=16, lora_alpha=32, lora_dropout=0.05, bias="none", task_type="CAUSAL_LM"
        ),
    )
    before = weights(trainer)
    assert any("lora" in name for name in before)
    trainer.train()
    assert_changed(before, trainer, "lora")


@pytest.mark.slow
def test_compute_metrics(ray_cluster, model, tokenizer, tmp_path):
    args = ORPOConfig(
        output_dir=tmp_path,
        remove_unused_columns=False,
        per_device_train_batch_size=2,
        do_eval=True,
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=2,
        report_to="none",
    )
    trainer = ORPOTrainer(
        model=model,
        args=args,
        processing_class=tokenizer,
        train_dataset=dataset()["train"],
        eval_dataset=dataset()["test"],
        compute_metrics=lambda *args, **kwargs: {"test": 0.0},
    )
    trainer.train()
    assert trainer.state.log_history[-2]["eval_test"] == 0.0


@pytest.mark.slow
def test_train_with_eval(ray_cluster, base, tmp_path):
    args = ORPOConfig(output_dir=tmp_path, eval_strategy="steps", eval_steps=3, report_to="none")
    data = dataset()
    trainer = ORPOTrainer(
        model=base, args=args, train_dataset=data["train"], eval_dataset=data["test"]
    )
    trainer.train()
    assert trainer.state.log_history[0]["eval_loss"] is not None


@pytest.mark.slow
def test_train_with_gradient_checkpointing(ray_cluster, base, tmp_path):
    args = ORPOConfig(
        output_dir=tmp_path, learning_rate=0.1, gradient_checkpointing=True, report_to="none"
    )
    trainer = ORPOTrainer(model=base, args=args, train_dataset=dataset()["train"])
    before = weights(trainer)
    trainer.train()
    assert_changed(before, trainer)


@pytest.mark.parametrize("peft_config", [None, LoraConfig()])
def test_tag_added(base, tmp_path, peft_config):
    """And of `test_tag_added_peft`: a model that is named has the adapters, too."""
    args = ORPOConfig(output_dir=tmp_path, report_to="none")
    data = dataset()["train"]
    trainer = ORPOTrainer(model=base, args=args, train_dataset=data, peft_config=peft_config)
    assert {"orpo", "orpo_ray"} <= set(trainer.model.model_tags)
    assert isinstance(trainer.model, PeftModel) == (peft_config is not None)


def test_trust_remote_code(base, tmp_path):
    """A folder of a model that brings its code along."""
    folder = tmp_path / "remote"
    shutil.copytree(base, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.A", "AutoModelForCausalLM": "own.B"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = AutoTokenizer.from_pretrained(base)
    with pytest.raises(ValueError, match="custom code"):
        ORPOTrainer(
            model=str(folder),
            args=ORPOConfig(output_dir=tmp_path, report_to="none"),
            processing_class=tokenizer,
            train_dataset=dataset()["train"],
        )
    with pytest.raises(ValueError, match="set model_revision to the full commit hash"):
        ORPOConfig(output_dir=tmp_path, trust_remote_code=True)
