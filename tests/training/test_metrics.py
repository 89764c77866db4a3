"""What a run writes down of its pairs and of the model's answers, beside its metrics."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from orpo_ray.runs.files import TIME_PARTS, TIME_PREFIX, read_metrics
from orpo_ray.runs.metrics import BY_NAME, EVALUATED, split_eval_key
from orpo_ray.storage.files import read_lines
from tests.reference.small_run import train_small
from tests.training.test_evaluation import evaluated


def scores(
    run_ranks: Callable[..., Any], folder: Path, model: Path
) -> dict[tuple[int, int], dict[str, Any]]:
    """Every pair of the inputs as the evaluation command, on one rank without sharding, sees it."""
    ((table, *_),) = run_ranks(1, evaluated, str(folder / "tokens"), str(model), {})
    return {(row["source"], row["row"] + 1): row for row in table.to_pylist()}


def test_margins_are_those_of_the_model_before_the_step(run_ranks, whole_run, inputs):
    """Two ranks share a batch; the file has it in the ledger's order. Six digits are written."""
    margins, ledger = (read_lines(whole_run / f"{name}.jsonl") for name in ("margins", "ledger"))
    assert [line["step"] for line in margins] == [line["step"] for line in ledger]
    assert all(len(m["margins"]) == len(x["rows"]) for m, x in zip(margins, ledger, strict=True))
    expected = scores(run_ranks, inputs, inputs / "model")
    first = [expected[source, row]["margin"] for source, row in ledger[0]["rows"]]
    assert margins[0]["margins"] == pytest.approx(first, abs=2e-6)


def test_evaluations_are_those_of_the_command_with_intervals(run_ranks, whole_run, inputs):
    lines = read_lines(whole_run / "evaluations.jsonl")
    assert [line["step"] for line in lines] == [0, 10, 20, 24]
    rows = list(scores(run_ranks, inputs, whole_run / "final").values())
    accuracy, low, high = lines[-1]["figures"]["accuracy"]
    assert accuracy == sum(row["margin"] > 0 for row in rows) / len(rows)
    assert low < accuracy < high
    log_odds = sum(row["log_odds"] for row in rows) / len(rows)
    assert lines[-1]["figures"]["log_odds"][0] == pytest.approx(log_odds, abs=1e-5)
    assert (lines[-1]["set"], lines[-1]["pairs"]) == ("eval_", 85)


def greedy(model_path: Path, prompt: str, n_tokens: int) -> list[int]:
    """The most likely answer, one whole forward pass a token and nothing cached."""
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    ids = [int(word.removeprefix("w")) for word in prompt.split()]
    answer: list[int] = []
    while len(answer) < n_tokens and answer[-1:] != [1]:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + answer])).logits
        answer.append(int(logits[0, -1].argmax()))
    return [token for token in answer if token != 1]


def test_samples_are_the_most_likely_answers_before_and_after(whole_run, inputs):
    """Sharded over two ranks, prompts of several lengths at a time; w1 is the end."""
    lines = read_lines(whole_run / "samples.jsonl")
    assert [line["step"] for line in lines] == [s for s in (0, 10, 20, 24) for _ in range(4)]
    for step, model in ((0, inputs / "model"), (24, whole_run / "final")):
        for line in (line for line in lines if line["step"] == step):
            expected = greedy(model, line["prompt"], 4)
            assert line["answer"].split() == [f"w{token}" for token in expected]
            assert line["chosen"]
    assert lines[0]["answer"] != lines[-4]["answer"]


def test_prompts_of_the_user_are_answered_without_evaluation_data(run_ranks, inputs, tmp_path):
    """A prompt that leaves no room in the 2048 positions is left out, and said to be."""
    run = tmp_path / "run"
    long = " ".join(["w5"] * 2040)
    changes = {"sample_prompts": ["w7 w8", long], "max_new_tokens": 9, "max_steps": 1}
    run_ranks(1, train_small, inputs, run, changes | {"evaluate": False})
    lines = read_lines(run / "samples.jsonl")
    assert [(line["step"], line["prompt"], line["chosen"]) for line in lines] == [
        (0, "w7 w8", None),
        (1, "w7 w8", None),
    ]
    assert all(0 < len(line["answer"].split()) <= 9 for line in lines)
    assert "sample_prompts: 1 of 2 leave no room" in (run / "run.log").read_text()


def test_every_logged_key_is_in_the_catalogue_of_metrics(whole_run):
    """Every metric is logged at some step, but the router loss of MoE and MFU, of GPUs only."""
    logged = {name for line in read_metrics(whole_run) for name in line}
    parsed = {name: split_eval_key(name) for name in logged if name.startswith("eval_")}
    assert all(parsed.values())
    assert logged - parsed.keys() == BY_NAME.keys() - {"aux_loss", "mfu"}
    evaluated = {found[1].name for found in parsed.values() if found}
    assert evaluated == {metric.name for metric in EVALUATED} - {"aux_loss"}


def test_the_parts_of_the_time_make_up_the_steps(whole_run):
    """Between two lines without an evaluation or a save, a worker waits, computes and updates."""
    lines = read_metrics(whole_run)
    assert not any("mfu" in line for line in lines)  # on GPUs only
    assert all(TIME_PREFIX + part in line for line in lines for part in TIME_PARTS)
    line = lines[1]
    in_steps = sum(
        line[TIME_PREFIX + part] for part in ("data_wait", "forward_backward", "optimizer")
    )
    assert in_steps == pytest.approx(5 * 8 / line["pairs_per_s"], rel=0.02, abs=1e-3)
    evaluated = [TIME_PREFIX + part for part in ("evaluation", "samples")]
    for line in lines:
        has_some = "eval_loss" in line
        assert all((line[name] > 0) == has_some for name in evaluated), json.dumps(line)
