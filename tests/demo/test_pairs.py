"""The demo's pairs are reproducible, hard to guess, and rated by the rule that is written down."""

import json
import math
import random
from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest

from orpo_ray.demo.pairs import FAMILIES, demo_pairs, write_demo_pairs

N_TRAIN, N_EVAL, SEED = 4000, 500, 7

Row = dict[str, str]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Row], list[Row]]:
    directory = tmp_path_factory.mktemp("demo")
    train, evaluation = write_demo_pairs(str(directory), N_TRAIN, N_EVAL, SEED)
    return _rows(train), _rows(evaluation)


def _rows(path: str) -> list[Row]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def test_same_seed_writes_the_same_bytes(tmp_path: Path) -> None:
    first = write_demo_pairs(str(tmp_path / "first"), 50, 20, SEED)
    again = write_demo_pairs(str(tmp_path / "again"), 50, 20, SEED)
    other = write_demo_pairs(str(tmp_path / "other"), 50, 20, SEED + 1)
    for ours, same, different in zip(first, again, other, strict=True):
        assert Path(ours).read_bytes() == Path(same).read_bytes()
        assert Path(ours).read_bytes() != Path(different).read_bytes()


def test_files_hold_what_was_asked_for(files: tuple[list[Row], list[Row]]) -> None:
    train, evaluation = files
    assert (len(train), len(evaluation)) == (N_TRAIN, N_EVAL)
    for row in train + evaluation:
        assert set(row) == {"prompt", "chosen", "rejected", "task"}
        assert all(row.values())
        assert row["chosen"] != row["rejected"]
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in evaluation}


def test_every_family_has_its_share(files: tuple[list[Row], list[Row]]) -> None:
    """Families are drawn alike, 1/5 each; one with few prompts repeats more and is drawn again.

    The smallest has 1152 prompts. Of some 560 draws of it, 1152 (1 - e^(-560/1152)) = 443 are new,
    0.18 of 2500 prompts; the deviation of such a share is 0.008.
    """
    prompts = {row["prompt"]: row["task"] for row in files[0]}
    shares = {task: n / len(prompts) for task, n in Counter(prompts.values()).items()}
    assert len(shares) == len(FAMILIES)
    assert all(0.14 < share < 0.27 for share in shares.values())


def test_a_quarter_of_the_prompts_repeat(files: tuple[list[Row], list[Row]]) -> None:
    """Ranked prompts are 1/4; with 3 or 4 drafts of two scores or more they have 2 to 6 pairs.

    The share of 2500 prompts has a standard deviation of 0.009. Four drafts with four different
    scores make 6 pairs, three drafts with two different scores make 2.
    """
    counts = [len(list(rows)) for _, rows in groupby(files[0], key=lambda row: row["prompt"])]
    assert len(counts) == len({row["prompt"] for row in files[0]})
    assert max(counts) <= 6
    assert {1, 2, 3, 4, 5} <= set(counts)
    assert sum(count > 1 for count in counts) / len(counts) == pytest.approx(0.25, abs=0.045)


def test_neither_side_is_longer(files: tuple[list[Row], list[Row]]) -> None:
    """A rater that likes long or short answers is right half of the time: sd 0.008 of 4000."""
    lead = [len(row["chosen"]) - len(row["rejected"]) for row in files[0]]
    longer = sum((n > 0) + 0.5 * (n == 0) for n in lead) / len(lead)
    assert longer == pytest.approx(0.5, abs=0.04)
    assert abs(sum(lead) / len(lead)) < 0.02 * sum(len(row["chosen"]) for row in files[0]) / N_TRAIN


def test_no_word_is_good_by_itself(files: tuple[list[Row], list[Row]]) -> None:
    """A naive Bayes rater of the answers' words, fitted on train, stays near a coin on eval.

    500 held-out pairs at 1/2 have a standard deviation of 0.022.
    """
    train, evaluation = files
    good = Counter(word for row in train for word in row["chosen"].split())
    bad = Counter(word for row in train for word in row["rejected"].split())

    def score(text: str) -> float:
        return sum(math.log((good[word] + 1) / (bad[word] + 1)) for word in text.split())

    right = [score(row["chosen"]) > score(row["rejected"]) for row in evaluation]
    assert abs(sum(right) / len(right) - 0.5) < 0.09


def test_rejected_answers_are_chosen_elsewhere() -> None:
    """Where prompts are few enough to tell, most rejected strings are chosen for another prompt."""
    pairs = [p for p in demo_pairs(8000, random.Random(SEED), set()) if p.task == "format"]
    prompts_of: dict[str, set[str]] = {}
    for pair in pairs:
        prompts_of.setdefault(pair.chosen, set()).add(pair.prompt)
    elsewhere = [bool(prompts_of.get(pair.rejected, set()) - {pair.prompt}) for pair in pairs]
    assert sum(elsewhere) / len(elsewhere) > 0.5


def _format_score(prompt: str, answer: str) -> int:
    """How many of the three requirements an answer meets, read off the two texts alone."""
    words, case, mark = prompt.strip().removeprefix("Join ").split(". ")
    joint = words.split(" with ")[1]
    joints = {"a comma": ",", "a dash": " - ", "the word and": " and ", "the word or": " or "}
    marks = {"a full stop": ".", "an exclamation mark": "!"}
    return (
        (joints[joint] in answer.lower())
        + (answer.isupper() == (case == "Use capitals"))
        + answer.endswith(marks[mark.removeprefix("End with ").rstrip(".")])
    )


def _facts_score(prompt: str, answer: str) -> int:
    """How many of the three facts in the answer stand in the prompt."""
    known = prompt.replace(",", "").replace(".", "").split()
    return sum(said.split()[-1] in known for said in answer.rstrip(".").split(", "))


SCORES = {"format": _format_score, "facts": _facts_score}


@pytest.mark.parametrize("task", sorted(SCORES))
def test_the_better_draft_is_chosen(files: tuple[list[Row], list[Row]], task: str) -> None:
    rows = [row for row in files[0] if row["task"] == task]
    assert len(rows) > N_TRAIN / 8
    for row in rows:
        score = SCORES[task]
        assert score(row["prompt"], row["chosen"]) > score(row["prompt"], row["rejected"]), row


@pytest.mark.parametrize("task", sorted(SCORES))
def test_frequency_says_little_about_quality(task: str) -> None:
    """The scores of chosen drafts have the distribution that makes NLL alone a poor rater.

    A draft meets k of 3 requirements with P(k) = C(3,k) 0.28^k 0.72^(3-k):
    0.3732, 0.4355, 0.1693, 0.0220. The better of two drafts has k with a probability in proportion
    to P(k) P(<k): 0.4355 x 0.3732 = 0.1625, 0.1693 x 0.8087 = 0.1370, 0.0220 x 0.9780 = 0.0215;
    in all 0.3210, so 0.506, 0.427 and 0.067 for k = 1, 2, 3, and
    (0.506 + 2 x 0.427 + 3 x 0.067) / 3 = 0.520 of the requirements are met.

    One way of meeting k has 0.506/3, 0.427/3 and 0.067 of the probability: the likeliest chosen
    draft meets one requirement, and the perfect one is the rarest. A perfect learner of these
    frequencies orders rightly only the pairs with k = 0, which is never chosen:
    0.3732 x 0.6268 / 0.3210 = 0.73 of them.

    950 pairs or more: standard deviation at most 0.016; the tolerance is four of them.
    """
    pairs = demo_pairs(12000, random.Random(SEED), set())
    runs = (list(run) for _, run in groupby(pairs, key=lambda pair: pair.prompt))
    plain = [run[0] for run in runs if len(run) == 1 and run[0].task == task]
    scores = Counter(SCORES[task](pair.prompt, pair.chosen) for pair in plain)
    worst = sum(SCORES[task](pair.prompt, pair.rejected) == 0 for pair in plain)
    tolerance = 4 * 0.5 / math.sqrt(len(plain))
    for score, expected in {1: 0.506, 2: 0.427, 3: 0.067}.items():
        assert scores[score] / len(plain) == pytest.approx(expected, abs=tolerance)
    assert worst / len(plain) == pytest.approx(0.729, abs=tolerance)


def test_too_many_pairs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"100000 demo pairs asked for, .* ask for fewer pairs"):
        demo_pairs(100_000, random.Random(SEED), set())
