"""`evaluate` against TRL 1.16's, of one model on the same pairs, in one batch."""

import warnings
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_ray import ORPOConfig, ORPOTrainer
from orpo_ray.demo.model import make_demo_model

METRICS = (
    *("eval_loss", "eval_nll_loss", "eval_log_odds_ratio", "eval_log_odds_chosen"),
    *("eval_rewards/chosen", "eval_rewards/rejected", "eval_rewards/accuracies"),
    *("eval_rewards/margins", "eval_logps/chosen", "eval_logps/rejected"),
)
# As most templates, it writes a newline after the end token.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "[{{ m['role'] }}] {{ m['content'] }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
Pairs = dict[str, list[Any]]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_demo_model(str(folder), ["What color is it? Red, blue or green."], 1)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


def dialogues() -> Pairs:
    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    colors = ("red", "blue", "green", "none at all, I think")
    return {
        "prompt": [turn("user", f"What color has number {i}?") for i in range(8)],
        "chosen": [turn("assistant", f"It is {colors[i % 4]}.") for i in range(8)],
        "rejected": [turn("assistant", f"Number {i} is {colors[-i % 3]}.") for i in range(8)],
    }


def as_text(tokenizer: Any, rows: Pairs, end: str) -> Pairs:
    """The same pairs with rendered prompts, and with what `end` is after each answer."""
    return {
        "prompt": [
            tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            for prompt in rows["prompt"]
        ],
        **{n: [turns[0]["content"] + end for turns in rows[n]] for n in ("chosen", "rejected")},
    }


def of_trl(base: Path, rows: Pairs, folder: Path) -> dict[str, float]:
    from trl.experimental.orpo import ORPOConfig as TheirConfig
    from trl.experimental.orpo import ORPOTrainer as TheirTrainer

    few = {"per_device_eval_batch_size": 8, "report_to": "none", "bf16": False, "use_cpu": True}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own names
        trainer = TheirTrainer(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32),
            TheirConfig(output_dir=str(folder), disable_tqdm=True, **few),
            train_dataset=datasets.Dataset.from_dict(rows),
            eval_dataset=datasets.Dataset.from_dict(rows),
            processing_class=AutoTokenizer.from_pretrained(base),
        )
        return trainer.evaluate()


def of_ours(base: Path, rows: Pairs, folder: Path) -> dict[str, float]:
    args = ORPOConfig(folder, per_device_eval_batch_size=8, special_tokens_in_text="allow")
    return ORPOTrainer(str(base), args, eval_dataset=rows).evaluate()


def assert_equal(ours: dict[str, float], theirs: dict[str, float]) -> None:
    assert {n: ours[n] for n in METRICS} == pytest.approx({n: theirs[n] for n in METRICS}, abs=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_evaluation_equals_trls(ray_cluster, base, tmp_path):
    """On text, and on conversations but for what TRL leaves after an answer.

    It keeps the newline that the template writes after the end token, and adds a second end token.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    rows = dialogues()
    text = as_text(tokenizer, rows, "")
    theirs = of_trl(base, text, tmp_path / "trl")
    assert_equal(of_ours(base, text, tmp_path), theirs)
    assert_equal(of_ours(base, rows, tmp_path), theirs)
    on_dialogues = of_trl(base, rows, tmp_path / "trl")
    assert abs(on_dialogues["eval_nll_loss"] - theirs["eval_nll_loss"]) > 1e-3
    kept = as_text(tokenizer, rows, tokenizer.eos_token + "\n")
    assert_equal(of_trl(base, kept, tmp_path / "trl"), on_dialogues)
