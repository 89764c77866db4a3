"""Numbers, durations, times and row counts as people read them."""

import math
from typing import Any

import pytest

from orpo_ray.runs.formatting import (
    format_duration,
    format_metric,
    format_rows,
    format_settings,
    format_time,
)

ROWS: dict[str, Any] = {
    "rows_read": 10,
    "rows_kept": 6,
    "rows_held_out": 1,
    "rows_refused": 3,
    "refused": {"empty_chosen": 1, "same_answers": 2},
}
REFUSED = "1 held out, 3 refused (2 same_answers, 1 empty_chosen)"


def test_a_value_that_was_not_finite_is_no_missing_one():
    assert format_metric(0.25) == "0.2500"
    assert format_metric(2.5, "+.1f") == "+2.5"
    assert format_metric(None) == "not finite"
    assert format_metric(math.nan) == "-"


def test_settings_on_one_line():
    assert format_settings({"beta": 0.25, "r": None, "n": 3}) == "beta=0.25, r=None, n=3"
    assert format_settings({}) == ""


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(59.9, "59 s"), (61, "1 min 1 s"), (7260, "2 h 1 min"), (3 * 86400, "3 days")],
)
def test_a_duration_in_its_two_largest_units(seconds, text):
    assert format_duration(seconds) == text


def test_times_are_utc():
    assert format_time(86400 + 3661.9) == "1970-01-02 01:01:01 UTC"


def test_rows_before_and_after_training():
    assert format_rows(ROWS) == f"10 rows read, 6 kept, {REFUSED}"
    trained = ROWS | {"rows_trained": 4, "rows_not_reached": 2, "rows_skipped": 0}
    assert format_rows(trained) == f"10 rows read, 6 kept (4 trained, 2 not reached), {REFUSED}"
    skipped = trained | {"rows_not_reached": 1, "rows_skipped": 1}
    kept = "6 kept (4 trained, 1 not reached, 1 skipped)"
    assert format_rows(skipped) == f"10 rows read, {kept}, {REFUSED}"


def test_rows_of_a_set_that_was_split_off():
    assert format_rows({"rows_kept": 4, "pairs": 4}) == "4 rows held out of the training files"
