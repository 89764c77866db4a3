"""A model that cannot be trained on the data is refused on the driver, with every finding."""

import logging
import sys
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, LlamaConfig

from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.config.train import TrainSection
from orpo_ray.dataset.ingest import held_out_set, ingest, pairs_longer_than
from orpo_ray.dataset.pair_index import PairStats
from orpo_ray.dataset.request import TRAIN
from orpo_ray.dataset.shards import TokenSet
from orpo_ray.orchestration.cluster import connection
from orpo_ray.orchestration.preflight import check_model, check_optimizer, check_schedule
from orpo_ray.preference.tokenization import Limits
from orpo_ray.pretrained import ModelSource
from orpo_ray.training.optimizer import build_scheduler, move_to_step
from tests.reference.ingest import (
    groups_of,
    map_tasks,
    request_of,
    text_row,
    write_rows,
    write_tokenizer,
)

N_ROWS = 12
LIMITS = Limits(512, truncation="drop")


def long_row(i: int) -> dict[str, str]:
    return text_row(i) | {"chosen": "q" * (100 + i)}


def save_model(folder: Path, **config: object) -> ModelSource:
    """A model for the tokenizer in a folder; with `n_positions` one with a table of positions."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = {"vocab_size": len(tokenizer)} | ends | config
    if "n_positions" in config:
        made = GPT2Config(n_embd=16, n_layer=1, n_head=2, **config)
    else:
        made = LlamaConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            **config,
        )
    AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    return ModelSource(str(folder), str(folder))


def tokens_of(folder: Path, rows: list[dict[str, str]], **changes: object) -> TokenSet:
    file = write_rows(folder / "pairs.jsonl", rows)
    request = request_of((file,), str(folder), folder, limits=LIMITS, **changes)
    return ingest(request, map_tasks)


def problems(source: ModelSource, sets: dict[str, TokenSet], **config: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check_model(ORPOConfig(**config), source, sets)
    return list(caught.value.lines)


def test_a_model_that_fits_is_accepted_without_a_word(tmp_path, caplog):
    """Its embedding has more rows than the tokenizer has tokens, as padded ones do."""
    write_tokenizer(tmp_path)
    source = save_model(tmp_path, vocab_size=1100, n_positions=128)
    sets = {TRAIN: tokens_of(tmp_path, [*map(text_row, range(N_ROWS)), long_row(0)])}
    with caplog.at_level(logging.WARNING, "orpo_ray"):
        check_model(ORPOConfig(lora_r=2), source, sets)
    assert not caplog.records


def test_a_token_without_an_embedding_is_named_with_its_row(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    n_before = len(tokenizer)
    tokenizer.add_tokens([AddedToken("<x1>"), AddedToken("<x2>")])
    tokenizer.save_pretrained(tmp_path)
    source = save_model(tmp_path, vocab_size=n_before)
    rows = [text_row(i) for i in range(N_ROWS)]
    sets = {TRAIN: tokens_of(tmp_path, rows)}
    check_model(ORPOConfig(), source, sets)  # no row has the tokens
    rows[4]["prompt"] += "<x1>"
    rows[7]["rejected"] += "<x2>"
    sets = {"eval_": tokens_of(tmp_path, rows)}
    largest = sets["eval_"].report["largest_token"]
    assert largest == {"id": n_before + 1, "file": str(tmp_path / "pairs.jsonl"), "row": 8}
    (line,) = problems(source, sets)
    for part in ("'<x2>'", f"id {n_before + 1}", "pairs.jsonl:8", f"{n_before} (vocab_size)"):
        assert part in line


@pytest.mark.parametrize(
    ("role", "text"),
    [("eos_token", "the end of every answer"), ("bos_token", "put before every prompt")],
)
def test_an_end_or_first_token_without_an_embedding_is_named(tmp_path, role, text):
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    n_before = len(tokenizer)
    tokenizer.add_special_tokens({role: "<new>"})
    tokenizer.save_pretrained(tmp_path)
    source = save_model(tmp_path, vocab_size=n_before)
    (line,) = problems(source, {TRAIN: tokens_of(tmp_path, [text_row(0)])})
    assert "'<new>'" in line
    assert text in line


def test_pairs_beyond_a_table_of_positions_are_refused_with_their_number(tmp_path):
    write_tokenizer(tmp_path)
    source = save_model(tmp_path, n_positions=64)
    rows = [*map(text_row, range(N_ROWS)), *map(long_row, range(3))]
    tokens = tokens_of(tmp_path, rows)
    lengths = [len(group.prompt) + max(map(len, group.completions)) for group in groups_of(tokens)]
    assert pairs_longer_than(tokens, 64) == (3, max(lengths))
    (line,) = problems(source, {TRAIN: tokens})
    assert "3 of 15 pairs of the train data are longer than the model's 64 positions" in line
    assert f"the longest has {max(lengths)} tokens: set max_length=64" in line


def test_pairs_beyond_the_positions_of_rope_are_logged_once(tmp_path, caplog):
    write_tokenizer(tmp_path)
    source = save_model(tmp_path, max_position_embeddings=64)
    sets = {TRAIN: tokens_of(tmp_path, [*map(text_row, range(N_ROWS)), long_row(0)])}
    with caplog.at_level(logging.WARNING, "orpo_ray"):
        check_model(ORPOConfig(), source, sets)
    (record,) = caplog.records
    assert "1 of 13 pairs of the train data are longer than the model's 64" in record.getMessage()


def test_pairs_that_are_held_out_are_counted_apart(tmp_path):
    write_tokenizer(tmp_path)
    rows = [text_row(i) | {"chosen": "q" * (i + 1)} for i in range(40)]
    tokens = tokens_of(tmp_path, rows, val_set_size=0.4)
    stats = [PairStats.load(tokens.folder, name) for name in PairStats.names(tokens.folder)]
    held = np.concatenate([part.held for part in stats])
    lengths = np.concatenate([part.lengths for part in stats])
    longest = lengths[:, 0] + lengths[:, 1:].max(axis=1)
    for limit in (1, 20, 30, 100):
        for part, mask in ((tokens, ~held), (held_out_set(tokens, 0.4), held)):
            expected = (int((longest[mask] > limit).sum()), int(longest[mask].max()))
            assert pairs_longer_than(part, limit) == expected


def test_one_file_for_training_and_evaluation_is_counted_in_both(tmp_path):
    """Equal token sets have one folder, in which nothing is held out."""
    write_tokenizer(tmp_path)
    source = save_model(tmp_path, n_positions=64)
    tokens = tokens_of(tmp_path, [long_row(0), text_row(1)])
    lines = problems(source, {TRAIN: tokens, "eval_": tokens})
    assert [("train data" in line, "eval data" in line) for line in lines] == [
        (True, False),
        (False, True),
    ]


def test_every_finding_is_said_at_once(tmp_path):
    write_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    n_before = len(tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<new>"})
    tokenizer.save_pretrained(tmp_path)
    source = save_model(tmp_path, vocab_size=n_before, n_positions=64)
    lines = problems(
        source,
        {TRAIN: tokens_of(tmp_path, [long_row(0)])},
        lora_r=2,
        lora_target_modules=("c_atn", "gate_up"),
    )
    assert [line.partition(":")[0] for line in lines] == [
        *["model_name_or_path"] * 2,
        *["lora_target_modules"] * 2,
    ]
    assert "did you mean c_attn?" in lines[2]
    assert "'gate_up' is no module of gpt2; it has ['c_attn', 'c_fc', 'c_proj']" in lines[3]


def test_missing_weights_and_unused_ones(tmp_path, caplog):
    write_tokenizer(tmp_path)
    source = save_model(tmp_path)
    sets = {TRAIN: tokens_of(tmp_path, [text_row(0)])}
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    save_file(weights | {"score.weight": torch.ones(1, 16)}, path, {"format": "pt"})
    check_model(ORPOConfig(), source, sets)
    assert "that are not used: score.weight" in caplog.text
    del weights["model.norm.weight"]
    save_file(weights, path, {"format": "pt"})
    (line,) = problems(source, sets)
    assert line.startswith(f"model_name_or_path: {tmp_path}: 1 of the model's weights are missing")
    assert "model.norm.weight" in line


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"load_in_4bit": True, "lora_r": 2}, "load_in_4bit"),
        ({"use_liger_kernel": True}, "use_liger_kernel"),
    ],
)
def test_what_needs_gpus_is_refused_where_workers_have_none(ray_cluster, settings, named):
    with pytest.raises(ConfigError, match=f"{named}: .* on GPUs only"):
        connection.with_cluster(ORPOConfig(**settings))
    assert not connection.with_cluster(ORPOConfig(use_liger_kernel=False)).ray.use_gpu


SCHEDULES = get_args(TrainSection.model_fields["lr_scheduler_type"].annotation)
ARGUMENTS = {"cosine_with_min_lr": {"min_lr": 1e-7}, "warmup_stable_decay": {"num_decay_steps": 4}}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_resumes_where_it_was(name):
    """After `move_to_step` a new schedule goes on as one that made the steps."""
    kwargs = ARGUMENTS.get(name)
    config = ORPOConfig(
        lr_scheduler_type=name, lr_scheduler_kwargs=kwargs, warmup_steps=2, learning_rate=1e-3
    )
    check_schedule(config)
    rates = []
    for moved in (0, 5):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
        scheduler = build_scheduler(optimizer, config.train, n_steps=10)
        if moved:
            move_to_step(scheduler, moved)
        seen = []
        for _ in range(moved, 10):
            seen.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
        rates.append(seen)
    assert rates[1] == pytest.approx(rates[0][5:])


def test_an_optimizer_without_its_package_is_refused_with_the_extra(monkeypatch):
    """No folder is searched: every package is missing, as far as it is not imported."""
    monkeypatch.setattr("sys.path", [])
    monkeypatch.delitem(sys.modules, "torchao", raising=False)
    with pytest.raises(ConfigError) as refused:
        check_optimizer(ORPOConfig(optim="adamw_8bit"))
    assert str(refused.value) == (
        "train.optim: adamw_8bit needs the package torchao: pip install 'orpo_ray[adamw-8bit]'"
    )
    check_optimizer(ORPOConfig(optim="adafactor"))


def test_arguments_that_a_schedule_does_not_take_or_lacks_are_refused():
    for given in (
        {"lr_scheduler_kwargs": {"min_lr": 0.1}},
        {"lr_scheduler_type": "warmup_stable_decay"},
    ):
        with pytest.raises(ConfigError, match=r"^train\.lr_scheduler_kwargs: "):
            check_schedule(ORPOConfig(**given))
