"""`orpo-ray convert` on the ORPO recipes that axolotl and others publish, with their values.

The texts are of this project; keys and values are those of the files that each test names.
"""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import yaml

from orpo_ray import ConfigError
from orpo_ray.cli import main
from orpo_ray.config.file import load_config
from orpo_ray.config.schema import ORPOConfig
from orpo_ray.orchestration.trainer.adapters import lora_settings
from orpo_ray.trl import arguments as trl
from orpo_ray.trl.recipes import convert

AXOLOTL: dict[str, Any] = {
    "base_model": "mistralai/Mistral-7B-v0.1",
    "model_type": "MistralForCausalLM",
    "tokenizer_type": "LlamaTokenizer",
    "load_in_8bit": False,
    "load_in_4bit": True,
    "strict": False,
    "rl": "orpo",
    "orpo_alpha": 0.1,
    "remove_unused_columns": False,
    "chat_template": "chatml",
    "datasets": [
        {
            "path": "argilla/ultrafeedback-binarized-preferences-cleaned",
            "type": "orpo.chat_template",
        }
    ],
    "dataset_prepared_path": "last_run_prepared",
    "val_set_size": 0.1,
    "output_dir": "./mistral-qlora-orpo-out",
    "adapter": "qlora",
    "lora_model_dir": None,
    "sequence_len": 4096,
    "sample_packing": False,
    "pad_to_sequence_len": True,
    "lora_r": 32,
    "lora_alpha": 16,
    "lora_dropout": 0.05,
    "lora_target_linear": True,
    "lora_fan_in_fan_out": None,
    "lora_target_modules": ["gate_proj", "down_proj", "up_proj", "q_proj", "v_proj"],
    "wandb_project": None,
    "gradient_accumulation_steps": 4,
    "micro_batch_size": 2,
    "num_epochs": 1,
    "optimizer": "adamw_bnb_8bit",
    "lr_scheduler": "cosine",
    "learning_rate": 0.0002,
    "train_on_inputs": False,
    "group_by_length": False,
    "bf16": "auto",
    "fp16": None,
    "tf32": False,
    "gradient_checkpointing": True,
    "early_stopping_patience": None,
    "logging_steps": 1,
    "flash_attention": True,
    "loss_watchdog_threshold": 5.0,
    "loss_watchdog_patience": 3,
    "warmup_steps": 10,
    "evals_per_epoch": 4,
    "eval_max_new_tokens": 128,
    "saves_per_epoch": 1,
    "deepspeed": None,
    "weight_decay": 0.0,
    "special_tokens": None,
}
FACTORY: dict[str, Any] = {
    "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
    "trust_remote_code": True,
    "stage": "dpo",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 8,
    "lora_target": "all",
    "pref_beta": 0.1,
    "pref_loss": "orpo",
    "dataset": "dpo_en_demo",
    "template": "llama3",
    "cutoff_len": 2048,
    "max_samples": 1000,
    "overwrite_cache": True,
    "preprocessing_num_workers": 16,
    "output_dir": "saves/llama3-8b/lora/dpo",
    "logging_steps": 10,
    "save_steps": 500,
    "plot_loss": True,
    "overwrite_output_dir": True,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 5.0e-6,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "ddp_timeout": 180000000,
}
OLD_FACTORY: dict[str, Any] = {
    "model_name_or_path": "meta-llama/Meta-Llama-3-8B-Instruct",
    "stage": "orpo",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_target": "q_proj,v_proj",
    "dataset": "orca_rlhf",
    "template": "llama3",
    "cutoff_len": 1024,
    "learning_rate": 0.00001,
    "warmup_steps": 0.1,
    "fp16": True,
    "val_size": 0.1,
    "per_device_eval_batch_size": 1,
    "evaluation_strategy": "steps",
    "eval_steps": 500,
}
HANDBOOK: dict[str, Any] = {
    "model_name_or_path": "mistral-community/Mixtral-8x22B-v0.1",
    "model_revision": "main",
    "torch_dtype": "bfloat16",
    "attn_implementation": "flash_attention_2",
    "chat_template": "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}",
    "dataset_name": "argilla/distilabel-capybara-dpo-7k-binarized",
    "dataset_train_split": "train",
    "dataset_num_proc": 8,
    "bf16": True,
    "beta": 0.05,
    "gradient_accumulation_steps": 1,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": True},
    "hub_model_id": "zephyr-orpo-141b-A35b",
    "learning_rate": 5.0e-6,
    "log_level": "info",
    "logging_steps": 10,
    "lr_scheduler_type": "inverse_sqrt",
    "max_length": 2048,
    "max_prompt_length": 1792,
    "num_train_epochs": 3,
    "optim": "adamw_bnb_8bit",
    "output_dir": "data/zephyr-orpo-141b-A35b",
    "per_device_train_batch_size": 1,
    "push_to_hub": True,
    "report_to": ["tensorboard", "wandb"],
    "save_strategy": "no",
    "seed": 42,
    "warmup_steps": 100,
}


def left_of(recipe: dict[str, Any], folder: Path) -> dict[str, str]:
    """What is said of a recipe's keys, by key."""
    lines = convert(recipe, folder).left
    return {line.replace("=", ":").partition(":")[0]: line for line in lines}


def test_axolotl(tmp_path):
    """examples/mistral/mistral-qlora-orpo.yml, at its commit 266ffb4."""
    found = convert(AXOLOTL, tmp_path)
    assert found.config == ORPOConfig(
        model_name_or_path="mistralai/Mistral-7B-v0.1",
        load_in_4bit=True,
        beta=0.1,
        dataset_name="argilla/ultrafeedback-binarized-preferences-cleaned",
        token_cache_dir="last_run_prepared",
        val_set_size=0.1,
        output_dir="./mistral-qlora-orpo-out",
        max_length=4096,
        lora_r=32,
        lora_alpha=16,
        lora_dropout=0.05,  # on all linear layers
        gradient_accumulation_steps=4,
        per_device_train_batch_size=2,
        num_train_epochs=1,
        lr_scheduler_type="cosine",
        learning_rate=0.0002,
        gradient_checkpointing=True,
        logging_steps=1,
        warmup_steps=10,
        eval_steps=0.25,
        save_steps="epoch",
        optim="adamw_8bit",
    )
    assert left_of(AXOLOTL, tmp_path).keys() == {
        *("model_type", "tokenizer_type", "chat_template", "pad_to_sequence_len"),
        *("flash_attention", "loss_watchdog_threshold", "loss_watchdog_patience"),
        *("eval_max_new_tokens", "optim", "tf32", "remove_unused_columns", "num_workers"),
    }


def test_llama_factory(tmp_path):
    """examples/train_lora/llama3_lora_dpo.yaml, at its commit 01fa59b, with `pref_loss: orpo`.

    Its ORPO averages the NLL over the chosen answer, and lora_alpha is twice the rank where it is
    not given; data sets are named in `dataset_info.json`.
    """
    (tmp_path / "data").mkdir()
    info = {"dpo_en_demo": {"file_name": "dpo_en_demo.json", "ranking": True}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    found = convert(FACTORY, tmp_path)
    assert found.config == ORPOConfig(
        model_name_or_path="meta-llama/Meta-Llama-3-8B-Instruct",
        train_files=[f"{tmp_path}/data/dpo_en_demo.json"],
        lora_r=8,
        lora_alpha=16,
        beta=0.1,
        nll_scope="completion",
        max_length=2048,
        output_dir="saves/llama3-8b/lora/dpo",
        logging_steps=10,
        save_steps=500,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        learning_rate=5e-6,
        num_train_epochs=3,
        lr_scheduler_type="cosine",
        warmup_ratio=0.1,
        bf16=True,
        process_group_timeout_s=1_000_000,  # the most that there is
    )
    assert left_of(FACTORY, tmp_path).keys() == {
        *("trust_remote_code", "template", "max_samples", "overwrite_cache", "plot_loss"),
        *("preprocessing_num_workers", "overwrite_output_dir", "ddp_timeout", "num_workers"),
    }


def test_llama_factory_as_it_was(tmp_path):
    """examples/lora_single_gpu/llama3_lora_orpo.yaml, at its commit e4972c8."""
    found = convert(OLD_FACTORY, tmp_path)
    config = found.config
    assert config.model.lora_target_modules == ("q_proj", "v_proj")
    assert (config.train.warmup_ratio, config.train.eval_steps) == (0.1, 500)
    assert (config.data.val_set_size, config.data.train_files) == (0.1, None)
    left = left_of(OLD_FACTORY, tmp_path)
    assert left["fp16"].startswith("fp16: not taken; set bf16=True")
    assert "set train_files or dataset_name" in left["dataset"]


def test_alignment_handbook(tmp_path):
    """recipes/zephyr-141b-A35b/orpo/config_full.yaml, at its commit 19f0345."""
    found = convert(HANDBOOK, tmp_path)
    same = {name: value for name, value in HANDBOOK.items() if name in found.leaves}
    same |= {"save_steps": None, "attention_kernel": "auto", "optim": "adamw_8bit"}
    assert found.config == ORPOConfig(**same)
    assert left_of(HANDBOOK, tmp_path).keys() == {
        *("torch_dtype", "model_init_kwargs", "optim", "gradient_checkpointing_kwargs"),
        *("log_level", "dataset_num_proc", "save_strategy", "push_to_hub", "hub_model_id"),
        "num_workers",
    }


def test_a_handbook_recipe_keeps_trls_defaults(tmp_path):
    few = {"model_name_or_path": "m", "dataset_mixer": {"org/data": 1.0}, "use_peft": False}
    config = convert(few | {"lora_r": 16, "lora_alpha": 16}, tmp_path).config
    assert config.data.dataset_name == "org/data"
    assert (config.train.learning_rate, config.model.lora_r) == (1e-6, None)
    assert config.train.gradient_checkpointing


def test_files_beside_a_recipe_are_files(tmp_path):
    (tmp_path / "mine.jsonl").touch()
    few = {"base_model": "m", "rl": "orpo", "learning_rate": 1e-5, "orpo_beta_typo": 1}
    found = convert(few | {"datasets": [{"path": "mine.jsonl"}, {"path": "org/x"}]}, tmp_path)
    assert found.config.data.train_files == ("mine.jsonl",)
    assert (found.config.data.max_length, found.config.train.lr_scheduler_type) == (512, "cosine")
    assert "orpo_beta_typo: not known here" in found.left
    assert any(line.startswith("datasets: several of the hub") for line in found.left)


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        ({"base_model": "m", "rl": "dpo"}, "a recipe of axolotl that trains dpo, not orpo"),
        ({"base_model": "m"}, "a recipe of axolotl that trains without pairs, not orpo"),
        ({"stage": "sft"}, "a recipe of LLaMA-Factory that trains sft, not orpo"),
        ({"stage": "dpo", "pref_loss": "sigmoid"}, "that trains sigmoid, not orpo"),
    ],
)
def test_recipes_of_something_else_are_refused(tmp_path, recipe, said):
    with pytest.raises(ConfigError, match=said):
        convert(recipe, tmp_path)


@pytest.mark.parametrize("recipe", [AXOLOTL, FACTORY, OLD_FACTORY, HANDBOOK])
def test_the_command_prints_a_config_that_is_read_back(tmp_path, capsys, recipe):
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["convert", str(tmp_path / "recipe.yaml")]) == 0
    text = capsys.readouterr().out
    assert text.startswith("# From recipe.yaml. What became no setting, or another one:\n# - ")
    (tmp_path / "ours.yaml").write_text(text)
    config = load_config(str(tmp_path / "ours.yaml"), [])
    assert config.model_dump() == convert(recipe, tmp_path).config.model_dump()


def test_a_file_that_is_no_recipe(tmp_path, capsys):
    (tmp_path / "list.yaml").write_text("- a\n")
    assert main(["convert", str(tmp_path / "list.yaml")]) == 2
    assert main(["convert", str(tmp_path / "none.yaml")]) == 2
    found = capsys.readouterr().err.splitlines()
    assert found[0].endswith("list.yaml: no keys and values")
    assert "No such file" in found[1]


def test_unsloths_notebook():
    """nb/Llama3_(8B)-ORPO.ipynb of unslothai/notebooks, at its commit 016b8dc: its arguments."""
    args = trl.ORPOConfig(
        max_length=4096,
        max_prompt_length=4096 // 2,
        max_completion_length=4096 // 2,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        beta=0.1,
        logging_steps=1,
        optim="adamw_8bit",
        lr_scheduler_type="linear",
        max_steps=30,
        output_dir="outputs",
        report_to="none",
    )
    assert (args.pairs_per_step, args.max_completion_length, args.output_dir) == (
        8,
        2048,
        "outputs",
    )
    adapters = peft.LoraConfig(
        r=16,
        target_modules=[
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ],
        lora_alpha=16,
        lora_dropout=0,
        bias="none",
        use_rslora=False,
    )
    found = args.replace(**lora_settings(adapters, "llama"), load_in_4bit=True)
    assert (found.lora_r, found.lora_alpha, len(found.lora_target_modules)) == (16, 16.0, 7)
