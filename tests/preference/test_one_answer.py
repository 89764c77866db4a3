"""Rows with one answer, which supervised fine-tuning takes and every other objective refuses."""

import numpy as np
import pytest

from orpo_ray.preference.groups import PromptGroup, RowId, chosen_alone
from orpo_ray.preference.layouts import Shape
from orpo_ray.preference.records import Reason, Refusal
from orpo_ray.preference.shapes import ParsedRow, RowReader

ONE = RowReader(takes_one_answer=True)
ASKED, ANSWERED = {"role": "user", "content": "Q?"}, {"role": "assistant", "content": "A."}
ROWS = {
    "chosen": ({"prompt": "Q?", "chosen": " A."}, "Q?", " A."),
    "null": ({"prompt": "Q?", "chosen": " A.", "rejected": None}, "Q?", " A."),
    "completion": ({"prompt": "Q?", "completion": " A."}, "Q?", " A."),
    "of messages": ({"prompt": [ASKED], "completion": [ANSWERED]}, (ASKED,), (ANSWERED,)),
    "conversation": ({"messages": [ASKED, ANSWERED]}, (ASKED,), (ANSWERED,)),
    "alpaca": ({"instruction": "Q?", "input": "", "output": "A."}, None, None),
    "dialogue": (
        {"chosen": "\n\nHuman: Q?\n\nAssistant: A."},
        "\n\nHuman: Q?\n\nAssistant:",
        " A.",
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Q?"}, {"from": "gpt", "value": "A."}]},
        (ASKED,),
        (ANSWERED,),
    ),
}


@pytest.mark.parametrize("name", ROWS)
def test_the_answer_of_a_row_is_found(name):
    row, prompt, answer = ROWS[name]
    found = ONE.read(row)
    assert isinstance(found, ParsedRow), found
    (record,) = found.records
    assert found.shape is Shape.ALONE
    assert found.ignored == frozenset()
    assert record.chosen == record.rejected
    if prompt is not None:
        assert (record.prompt, record.chosen) == (prompt, answer)


@pytest.mark.parametrize("name", ROWS)
def test_other_objectives_refuse_it(name):
    found = RowReader().read(ROWS[name][0])
    assert isinstance(found, Refusal)
    assert found.reason in (Reason.MISSING_FIELD, Reason.NULL_FIELD)
    assert found.detail.endswith("; objective=sft takes rows of one answer")
    empty = RowReader().read({"prompt": "Q?", "note": "no answer"})
    assert isinstance(empty, Refusal)
    assert "sft" not in empty.detail


def test_two_answers_stay_two():
    row = {"prompt": "Q?", "chosen": " A.", "rejected": " B.", "completion": " C."}
    (record,) = ONE.read(row).records
    assert (record.chosen, record.rejected) == (" A.", " B.")
    same = ONE.read({"prompt": "Q?", "chosen": " A.", "rejected": " A."})
    assert isinstance(same, Refusal)
    assert same.reason is Reason.IDENTICAL_ANSWERS


def test_an_empty_answer_is_refused():
    found = ONE.read({"prompt": "Q?", "completion": "  "})
    assert isinstance(found, Refusal)
    assert found.reason is Reason.EMPTY_CHOSEN


def test_a_group_without_its_rejected_completions():
    """Two pairs with one chosen answer count it twice, as their two rows would."""
    tokens = [np.array([n], np.int32) for n in (5, 6, 7, 8)]
    rows = (RowId(0, 0), RowId(0, 1), RowId(0, 2))
    group = PromptGroup(tokens[0], tuple(tokens[1:]), ((2, 0), (2, 1), (0, 1)), rows)
    alone = chosen_alone(group)
    assert [part.tolist() for part in alone.completions] == [[6], [8]]
    assert alone.pairs == ((1, 1), (1, 1), (0, 0))
    assert alone.row_ids == rows
    assert alone.n_tokens == 3
