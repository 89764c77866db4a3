"""TRL's script for ORPO with our import: its two examples, with few steps and a small model."""

from pathlib import Path

import datasets
import pytest

from orpo_ray import ConfigError, ORPOConfig
from orpo_ray.demo.model import make_demo_model
from tests.trl.pairs import row

# The arguments of its examples, but for `--max_steps 1000 --eval_steps 500 --report_to wandb`.
PLAIN = """
--per_device_train_batch_size 4 --max_steps 2 --learning_rate 8e-6 --gradient_accumulation_steps 1
--logging_steps 10 --eval_steps 2 --warmup_steps 150 --report_to none --bf16 False
--logging_first_step --no_remove_unused_columns
"""
ADAPTERS = PLAIN.replace("8e-6", "8e-5") + " --use_peft --lora_r=16 --lora_alpha=16"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("line", [PLAIN, ADAPTERS], ids=["plain", "adapters"])
def test_the_script_runs(ray_cluster, run_here, tmp_path, line):
    """Rows are whole conversations; with their prompt beside them they are refused."""
    make_demo_model(str(tmp_path / "base"), ["What color is number 1? It is red."], 1)
    rows = [row("conversational_implicit_prompt_preference", i) for i in range(10)]
    splits = {"train": rows[:8], "test": rows[8:]}
    datasets.DatasetDict(
        {name: datasets.Dataset.from_list(part) for name, part in splits.items()}
    ).save_to_disk(tmp_path / "data")
    places = {"model_name_or_path": "base", "dataset": "data", "output_dir": "out"}
    where = [f"--{name}={tmp_path / folder}" for name, folder in places.items()]
    done = run_here(tmp_path, "tests/trl/orpo_script.py", *where, *line.split())
    assert done.returncode == 0, done.stderr
    saved = {path.name for path in Path(tmp_path, "out").iterdir()}
    weights = "adapter_model.safetensors" if line == ADAPTERS else "model.safetensors"
    assert {weights, "tokenizer.json", "README.md"} <= saved
    assert "'loss':" in done.stdout


def test_its_optimizer_is_refused():
    """Of the second example."""
    with pytest.raises(ConfigError, match="optim: not taken; the optimizer is AdamW"):
        ORPOConfig(optim="rmsprop")
