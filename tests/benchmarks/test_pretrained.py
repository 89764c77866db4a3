"""The parts of `benchmarks/pretrained.py` that need no model: pairs, their scores, the table."""

import json
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orpo_ray.runs.statistics import Scores, estimates
from tests.conftest import ROOT

sys.path.append(str(ROOT / "benchmarks"))

from real_model import table
from real_model.pairs import make_files, prompt_key, read_pairs, split
from real_model.plan import FULL, SHORT
from real_model.runs import minutes_left
from real_model.verdict import compare, over_seeds, read_scores


def dialogue(*turns):
    names = ("Human", "Assistant")
    return "".join(f"\n\n{names[i % 2]}: {text}" for i, text in enumerate(turns))


def pair(question, chosen="Fine.", rejected="No."):
    return {"chosen": dialogue(question, chosen), "rejected": dialogue(question, rejected)}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def scores(log_odds, margin, prompts=None, n_tokens=5.0):
    """Scores whose rejected answers all have the log-probability -2."""
    n = len(log_odds)
    rejected = np.full(n, -2.0)
    lengths = np.full(n, n_tokens), np.where(np.arange(n) % 2, n_tokens + 1, n_tokens - 1)
    prompts = np.arange(n) if prompts is None else np.asarray(prompts)
    return Scores(prompts, rejected + margin, rejected, np.asarray(log_odds), *lengths)


def test_dialogues_become_turns(tmp_path):
    rows = [
        {
            "chosen": dialogue("Hi", "Hello", "What now?", " Wait. "),
            "rejected": dialogue("Hi", "Hello", "What now?", "Go."),
        },
        pair("Empty?", chosen=" "),
        {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    ]
    first, second = read_pairs(write(tmp_path / "a.jsonl", rows))
    assert [m["role"] for m in first["prompt"]] == ["user", "assistant", "user"]
    assert first["prompt"][2]["content"] == "What now?"
    assert first["chosen"] == [{"role": "assistant", "content": "Wait."}]
    assert second["prompt"] == [{"role": "user", "content": "2+2?"}]


def test_no_prompt_is_on_both_sides_of_the_split(tmp_path):
    rows = [pair(f"q{i % 30}", chosen=f"answer {i}") for i in range(90)]
    pairs = list(read_pairs(write(tmp_path / "a.jsonl", rows)))
    train, dev = split(pairs)
    assert len(dev) == 15  # three pairs of each of 30 / 6 prompts
    assert len(train) + len(dev) == 90
    assert not {prompt_key(p) for p in train} & {prompt_key(p) for p in dev}
    assert split(pairs) == (train, dev)
    assert split(pairs, seed=1) != (train, dev)


def test_held_out_prompts_are_not_trained(tmp_path):
    train = write(tmp_path / "train.jsonl", [pair(f"q{i}") for i in range(24)])
    evals = write(tmp_path / "eval.jsonl", [pair(f"q{i}") for i in range(20, 40)])
    counts = make_files(
        tmp_path, {"train": train, "held-out": evals}, list, {"train": 7, "held-out": None}
    )
    assert counts == {"train": 7, "dev": 4, "held-out": 16, "overlap": 4}
    held_out = [json.loads(line) for line in (tmp_path / "held-out.jsonl").read_text().splitlines()]
    assert held_out[0]["prompt"][0]["content"] == "q24"


def test_a_file_without_pairs_is_named(tmp_path):
    train = write(tmp_path / "train.jsonl", [pair(f"q{i}") for i in range(24)])
    evals = write(tmp_path / "eval.jsonl", [pair("q3")])
    limits = {"train": None, "held-out": None}
    with pytest.raises(SystemExit, match=r"eval\.jsonl: no pair is left for held-out"):
        make_files(tmp_path, {"train": train, "held-out": evals}, list, limits)


def test_scores_are_read_in_the_order_of_rows(tmp_path):
    columns = {
        "row": [3, 1, 2],
        "prompt_key": [30, 10, 20],
        "logps_chosen": [-3.0, -1.0, -2.0],
        "logps_rejected": [-4.0, -4.0, -4.0],
        "log_odds": [0.3, 0.1, 0.2],
        "chosen_tokens": [3, 1, 2],
        "rejected_tokens": [1, 1, 1],
    }
    pq.write_table(pa.table(columns), tmp_path / "scores.parquet")
    found = read_scores(tmp_path / "scores.parquet")
    assert found.chosen.tolist() == [-1.0, -2.0, -3.0]
    assert found.prompts.tolist() == [0, 1, 2]


def test_the_claim_holds_only_where_both_statistics_are_higher():
    rng = np.random.default_rng(5)
    base = rng.normal(0.0, 1.0, 80)
    sft = [scores(base + rng.normal(0, 0.01, 80), base) for _ in range(2)]
    orpo = [scores(one.log_odds + 0.2, base + 0.1) for one in sft]
    found = compare(orpo, sft)
    assert found.holds
    assert found.tested["log_odds"].value == pytest.approx(0.2)
    assert found.tested["margin"].value == pytest.approx(0.1)
    assert found.by_seed == pytest.approx([0.2, 0.2])
    assert found.tested["logps_chosen"].value == pytest.approx(0.1)
    assert found.others["nll"].value == pytest.approx(-0.1)
    assert found.tested["logps_rejected"].low == found.tested["logps_rejected"].high == 0.0
    lower = [scores(one.log_odds + 0.2, base - 0.1) for one in sft]
    assert not compare(lower, sft).holds
    noise = [scores(one.log_odds + rng.choice([-0.2, 0.2], 80), base + 0.1) for one in sft]
    assert not compare(noise, sft).holds


def test_seeds_of_one_prompt_are_no_further_evidence():
    """Three equal runs have the interval and the p-value of one: a prompt is flipped as a whole."""
    rng = np.random.default_rng(3)
    base, gain = rng.normal(0, 1, 40), rng.normal(0.1, 0.5, 40)
    one, other = scores(base + gain, base), scores(base, base)
    once, thrice = compare([one], [other]), compare([one] * 3, [other] * 3)
    assert thrice.tested["log_odds"].p_value == once.tested["log_odds"].p_value
    assert thrice.tested["log_odds"].low == pytest.approx(once.tested["log_odds"].low)
    assert thrice.others["nll"].high == pytest.approx(once.others["nll"].high)
    assert len(over_seeds([one] * 3).prompts) == 120
    with pytest.raises(ValueError, match="not of the same pairs"):
        over_seeds([one, scores(base[:-1], base[:-1])])


def test_the_table_says_what_came_out():
    base = np.linspace(-1.0, 1.0, 60)
    orpo, sft = scores(base + 0.3, base + 0.1), scores(base, base)
    better = compare([orpo], [sft])
    assert table.verdict(better).startswith("**Shown: ORPO less SFT, log odds +0.3000, p 0.0")
    assert table.verdict(compare([sft], [orpo])).startswith("**NOT SHOWN")
    expected = list(table.second(better))
    assert expected[2] == "- not shown: logps rejected is lower: +0.0000 (+0.0000 to +0.0000)"
    assert expected[0].startswith("- ")
    assert expected[3].endswith("nats a token: -0.1000 (-0.1000 to -0.1000)")
    rows = list(table.comparisons({"orpo less sft": better}))
    assert len(rows) == 2 + len(table.COLUMNS)
    assert len({row.count("|") for row in rows}) == 1
    (log_odds,) = (row for row in rows if "log odds" in row)
    assert "| +0.3000 (+0.3000 to +0.3000) | 0.0" in log_odds
    assert log_odds.endswith("| +0.3000 |")
    rows = list(table.sides({"sft (1)": estimates(sft)}))
    assert rows[2].startswith("| sft (1) | 0.500 (")
    assert len({row.count("|") for row in rows}) == 1


def test_samples_are_counted_by_kind():
    answers = [
        {"prompt": "a", "kind": "general", "answer": "x\ny", "tokens": 4, "ended": True},
        {"prompt": "b", "kind": "general", "answer": "z", "tokens": 7, "ended": False},
        {"prompt": "c", "kind": "harmful", "answer": "w" * 200, "tokens": 9, "ended": True},
    ]
    lines = list(table.samples({"base": answers}))
    assert "| base | 5.5 | 9.0 | 2 of 3 |" in lines
    assert "  - base: x y" in lines
    assert f"  - base: {'w' * 160}..." in lines


def test_the_plan_and_the_time_that_is_left():
    names = [side.name for side in FULL.sides()]
    assert len(set(names)) == len(names) == 12
    assert [side.name for side in SHORT.sides()] == ["orpo-seed-0", "sft-seed-0"]
    assert minutes_left(SHORT, {"orpo-seed-0": 120.0}) == pytest.approx(2.0)
    # Ten sides of a minute each, and TRL's of two.
    done = {"orpo-seed-0": 60.0}
    assert minutes_left(FULL, done) == pytest.approx(10 + 2)
