"""The demo's preference pairs: a seeded generator of prompts, imperfect drafts and a rater.

**The rule.** Every prompt has three requirements. A writer answers it with drafts that meet each
requirement with probability `MEETS`, independently; the rater counts the requirements a draft
meets, and of two drafts with different counts the higher one is chosen. So a chosen answer is the
better of two drafts, not a perfect one, as in data that people rate.

**What that does to likelihood.** With `MEETS` = 0.35 the better of two drafts meets a given
requirement 0.52 of the time (`tests/preference/test_demo_pairs.py` derives it), so NLL on chosen
answers alone learns that meeting and missing it are about equally likely, however long it trains:
likelihood follows frequency, and the frequencies say almost nothing. Which side of a pair is
better is only in the comparison, and only the odds-ratio term makes it. `beta=0` on the same data
therefore learns the language and hardly any of the preference.

**What cannot solve it.** What meets a requirement in one prompt misses it in another, so no token
is good or bad by itself; both sides are fluent, use the same words and have the same lengths.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

MEETS = 0.35
RANKED_SHARE = 0.25
REQUIREMENTS = 3
_ATTEMPTS = 1000

Draft = Callable[[random.Random, Sequence[bool]], str]
Option = TypeVar("Option")


@dataclass(frozen=True)
class Task:
    """One prompt, and how a draft that meets some of its requirements is written."""

    name: str
    prompt: str
    draft: Draft


@dataclass(frozen=True)
class DemoPair:
    """One row of the demo's files."""

    prompt: str
    chosen: str
    rejected: str
    task: str


NAMES = ("Ann", "Ben", "Cara", "Dan", "Eva", "Finn", "Gus", "Hana", "Ivo", "Jill", "Kim", "Leo")
COLOURS = ("red", "blue", "green", "black", "white", "brown", "pink", "grey")
ITEMS = ("scarf", "lamp", "chair", "clock", "kettle", "jacket", "basket", "mirror", "carpet", "tent")
CITIES = ("Oslo", "Rome", "Paris", "Cairo", "Lima", "Delhi", "Kyoto", "Quito")
PETS = ("cat", "dog", "horse", "parrot", "goat", "rabbit", "turtle", "hen")
DRINKS = ("tea", "milk", "cocoa", "juice", "water", "coffee", "cider", "broth")
WORDS = ("apple", "river", "stone", "cloud", "bread", "tiger", "piano", "train", "candle", "garden")
TOPICS = ("the book", "the visit", "the garden", "the concert", "the recipe", "the photo")

OPENINGS = {
    "kind": ("Thank you for asking us.", "It is good to hear.", "We are glad you wrote."),
    "firm": ("Please read the order first.", "It is not our fault.", "We have answered this already."),
}
CLOSINGS = {
    "kind": ("Write to us at any time.", "We are happy to help."),
    "firm": ("Do not write to us again.", "We will not discuss it."),
}
SITUATIONS = ("is on its way", "will come on Monday", "left our shop today", "is ready now")
ASKS = (
    "A customer asks where the {item} is.",
    "A customer is waiting for the {item}.",
    "A letter came in about the {item}.",
    "Someone ordered the {item} last week.",
)

FORMAL = ("teacher", "doctor", "judge", "mayor", "lawyer")
CASUAL = ("friend", "cousin", "brother", "sister", "neighbour")
GREETINGS = {"formal": ("Dear", "Good morning"), "casual": ("Hey", "Hello there")}
FAREWELLS = {
    "formal": ("Yours sincerely", "With kind regards"),
    "casual": ("See you soon", "Lots of love"),
}

JOINTS = {"a comma": ", ", "a dash": " - ", "the word and": " and ", "the word or": " or "}
MARKS = {"a full stop": ".", "an exclamation mark": "!", "a question mark": "?"}
CASES: dict[str, Callable[[str], str]] = {"small letters": str.lower, "capitals": str.upper}


def write_demo_pairs(directory: str, n_train: int, n_eval: int, seed: int) -> tuple[str, str]:
    """Write train.jsonl and eval.jsonl, the same bytes for the same arguments.

    The rows of a prompt stand together, and no prompt is in both files. A quarter of the prompts
    have three or four drafts, and one pair for every two that the rater tells apart.

    Args:
        directory: where the files go; made when missing.
        n_train: pairs in train.jsonl.
        n_eval: pairs in eval.jsonl.
        seed: of the prompts and the drafts.

    Returns:
        The paths of train.jsonl and eval.jsonl.

    Raises:
        ValueError: if there are not enough different prompts for so many pairs.
    """
    rng = random.Random(seed)
    taken: set[str] = set()
    Path(directory).mkdir(parents=True, exist_ok=True)
    paths = []
    for name, n_pairs in (("eval.jsonl", n_eval), ("train.jsonl", n_train)):
        path = Path(directory) / name
        lines = [json.dumps(vars(pair)) + "\n" for pair in demo_pairs(n_pairs, rng, taken)]
        path.write_text("".join(lines), encoding="utf-8", newline="\n")
        paths.append(str(path))
    evaluation, train = paths
    return train, evaluation


def demo_pairs(n_pairs: int, rng: random.Random, taken: set[str]) -> list[DemoPair]:
    """Draw pairs for prompts that are not in `taken`, and add those prompts to it.

    Raises:
        ValueError: if there are not enough different prompts for so many pairs.
    """
    pairs: list[DemoPair] = []
    while len(pairs) < n_pairs:
        task = _new_task(rng, taken)
        if task is None:
            raise ValueError(
                f"{n_pairs} demo pairs asked for, {len(pairs)} made: no new prompt in "
                f"{_ATTEMPTS} draws; ask for fewer pairs"
            )
        pairs.extend(_rated(task, rng))
    return pairs[:n_pairs]


def _new_task(rng: random.Random, taken: set[str]) -> Task | None:
    """A task whose prompt is not in `taken`, where it then is; None if none turns up."""
    for _ in range(_ATTEMPTS):
        task = _pick(rng, FAMILIES)(rng)
        if task.prompt not in taken:
            taken.add(task.prompt)
            return task
    return None


def _rated(task: Task, rng: random.Random) -> Iterator[DemoPair]:
    """Draw the drafts of one prompt until some differ in score, and pair those that do."""
    n_drafts = 2 if rng.random() >= RANKED_SHARE else 3 + int(2 * rng.random())
    scored: dict[str, int] = {}
    while len(scored) < n_drafts or len(set(scored.values())) == 1:
        meets = [rng.random() < MEETS for _ in range(REQUIREMENTS)]
        if len(scored) == n_drafts:
            scored.clear()
        scored[task.draft(rng, meets)] = sum(meets)
    for chosen, high in scored.items():
        for rejected, low in scored.items():
            if high > low:
                yield DemoPair(task.prompt, chosen, rejected, task.name)


def _reply(rng: random.Random) -> Task:
    """Answer a customer about the right thing, opening and closing in the tone asked for."""
    item, other = _two(rng, [f"{colour} {item}" for colour in COLOURS for item in ITEMS])
    tone, opposite = _two(rng, list(OPENINGS))
    prompt = f"{_pick(rng, ASKS).format(item=item)} Write a {tone} reply.\n"

    def draft(rng: random.Random, meets: Sequence[bool]) -> str:
        opening = _pick(rng, OPENINGS[tone if meets[0] else opposite])
        thing = item if meets[1] else other
        closing = _pick(rng, CLOSINGS[tone if meets[2] else opposite])
        return f"{opening} Your {thing} {_pick(rng, SITUATIONS)}. {closing}"

    return Task("reply", prompt, draft)


def _letter(rng: random.Random) -> Task:
    """Greet and sign off as the reader's standing asks, about the right topic."""
    name = _pick(rng, NAMES)
    topic, other = _two(rng, TOPICS)
    register, opposite = _two(rng, ("formal", "casual"))
    reader = _pick(rng, FORMAL if register == "formal" else CASUAL)
    prompt = f"Write to {name}, your {reader}, and say thanks for {topic}.\n"

    def draft(rng: random.Random, meets: Sequence[bool]) -> str:
        greeting = _pick(rng, GREETINGS[register if meets[0] else opposite])
        farewell = _pick(rng, FAREWELLS[register if meets[2] else opposite])
        return f"{greeting} {name}, thanks for {topic if meets[1] else other}. {farewell}!"

    return Task("letter", prompt, draft)


def _format(rng: random.Random) -> Task:
    """Join two words with the joint, the case and the end mark asked for."""
    first, second = _two(rng, WORDS)
    joint, case, mark = (_two(rng, list(options)) for options in (JOINTS, CASES, MARKS))
    prompt = (
        f"Join {first} and {second} with {joint[0]}. Use {case[0]}. End with {mark[0]}.\n"
    )

    def draft(rng: random.Random, meets: Sequence[bool]) -> str:
        between, casing, end = (
            options[0 if met else 1]
            for options, met in zip((joint, case, mark), meets, strict=True)
        )
        return CASES[casing](f"{first}{JOINTS[between]}{second}") + MARKS[end]

    return Task("format", prompt, draft)


def _facts(rng: random.Random) -> Task:
    """Say again what the prompt says about a person, in another order."""
    name = _pick(rng, NAMES)
    city, pet, drink = (_two(rng, options) for options in (CITIES, PETS, DRINKS))
    prompt = f"{name} lives in {city[0]}, has a {pet[0]} and likes {drink[0]}. Who is {name}?\n"

    def draft(rng: random.Random, meets: Sequence[bool]) -> str:
        home, animal, taste = (
            options[0 if met else 1]
            for options, met in zip((city, pet, drink), meets, strict=True)
        )
        return f"{name} likes {taste}, lives in {home} and has a {animal}."

    return Task("facts", prompt, draft)


def _count(rng: random.Random) -> Task:
    """Say who of two has more, or fewer, of what, and how many."""
    winner, loser = _two(rng, NAMES)
    thing, other = _two(rng, ITEMS)
    few, many = sorted(_two(rng, range(2, 10)))
    word, number, rest = ("more", many, few) if rng.random() < 0.5 else ("fewer", few, many)
    holders = [f"{winner} has {number}", f"{loser} has {rest}"]
    if rng.random() < 0.5:
        holders.reverse()
    prompt = f"{holders[0]} {thing}s, {holders[1]}. Who has {word}?\n"

    def draft(rng: random.Random, meets: Sequence[bool]) -> str:
        who = winner if meets[0] else loser
        amount = number if meets[1] else rest
        return f"{who} has {word}, that is {amount} {thing if meets[2] else other}s."

    return Task("count", prompt, draft)


FAMILIES = (_reply, _letter, _format, _facts, _count)


def _pick(rng: random.Random, options: Sequence[Option]) -> Option:
    """One of the options; from `random()` alone, the only draw Python promises to keep stable."""
    return options[int(rng.random() * len(options))]


def _two(rng: random.Random, options: Sequence[Option]) -> tuple[Option, Option]:
    """Two different options, in random order."""
    first = int(rng.random() * len(options))
    second = int(rng.random() * (len(options) - 1))
    return options[first], options[second + (second >= first)]
