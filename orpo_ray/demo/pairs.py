"""The demo's preference pairs: a seeded generator of prompts, imperfect drafts and a rater.

**The rule.** Every prompt has three requirements. A writer answers it with drafts that meet each
requirement with probability `MEETS`, independently; the rater counts the requirements a draft
meets, and of two drafts with different counts the higher one is chosen. So a chosen answer is the
better of two drafts, not a perfect one, as in data that people rate.

**What that does to likelihood.** Good drafts are rare: the better of two meets a requirement only
0.52 of the time, and among chosen drafts those that meet one requirement are likelier than those
that meet two or three. NLL on chosen answers learns these frequencies, so it prefers the common
draft to the good one, however long it trains; learnt perfectly, they order 0.73 of the pairs
(`tests/demo/test_pairs.py` derives both numbers), and hardly any pair by a margin.
Which of two drafts is better is said by the comparison alone, and only the odds-ratio term reads
it. That is why `beta=0` on the same pairs learns the language and little of the preference.

**What cannot solve it.** What meets a requirement in one prompt misses it in another, so no token
is good or bad by itself; both sides are fluent, use the same words and have the same lengths. A
miss is always the same mix-up (`Oslo` for `Rome`), so it is as frequent as what it stands for.
"""

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

MEETS = 0.28
RANKED_SHARE = 0.25
REQUIREMENTS = 3
_ATTEMPTS = 1000

Contrast = tuple[str, str]
Draft = Callable[[random.Random, Sequence[bool]], str]
Option = TypeVar("Option")


@dataclass(frozen=True)
class Task:
    """One prompt, and the function that writes a draft meeting given requirements of it."""

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


WOMEN = ["Ann", "Cara", "Eva", "Hana", "Jill", "Kim", "Mia", "Olga", "Rita", "Tess", "Uma", "Zoe"]
MEN = ["Ben", "Dan", "Finn", "Gus", "Ivo", "Leo", "Ned", "Paul", "Sam", "Vic", "Will", "Yuri"]
NAMES = WOMEN + MEN
COLOURS = ["red", "blue", "green", "black", "white", "brown", "pink", "grey", "gold", "purple"]
THINGS = ["river", "stone", "cloud", "tiger", "piano", "candle", "garden", "bridge", "coat", "boat"]
VERBS = ["paint", "work", "cook", "play", "walk", "rest", "talk", "train"]

# Options that are easily mixed up: if one is asked for, a draft may contain the other instead.
ITEMS = (("scarf", "shawl"), ("lamp", "clock"), ("kettle", "teapot"))
TOPICS = (("book", "song"), ("visit", "concert"), ("cake", "recipe"))
CITIES = (("Oslo", "Rome"), ("Cairo", "Lima"))
PETS = (("cat", "dog"), ("horse", "parrot"))
DRINKS = (("tea", "milk"), ("cocoa", "juice"))
DAYS = (("yesterday", "tomorrow"),)
PLACES = (("home", "park"), ("school", "beach"))
TIMES = (("dawn", "night"), ("noon", "dusk"))
JOINTS = (("a comma", "a dash"), ("the word and", "the word or"))
CASES = (("small letters", "capitals"),)
MARKS = (("a full stop", "an exclamation mark"),)
TONES = (("kind", "firm"),)
REGISTERS = (("formal", "casual"),)

WRITTEN = {
    "yesterday": "{}ed",
    "tomorrow": "will {}",
    "home": "at home",
    "park": "in the park",
    "school": "at school",
    "beach": "on the beach",
    "dawn": "before sunrise",
    "night": "after dark",
    "noon": "over lunch",
    "dusk": "at sunset",
    "a comma": ", ",
    "a dash": " - ",
    "the word and": " and ",
    "the word or": " or ",
    "a full stop": ".",
    "an exclamation mark": "!",
}

ASKS = (
    "{} asks where the {} is.",
    "{} is waiting for the {}.",
    "A letter from {} is about the {}.",
    "{} ordered the {} last week.",
)
OPENINGS = {
    "kind": ("Thank you for asking.", "We are glad to help."),
    "firm": ("Please read the order.", "It is not our fault."),
}
SITUATIONS = ("is on its way", "will come on Monday")
CLOSINGS = {
    "kind": ("Write to us at any time.", "Have a very nice day."),
    "firm": ("Do not write to us again.", "This is our last reply."),
}
NOTES = ("Write to {}, your {}, and say thanks for the {}.", "Thank {}, your {}, for the {}.")
READERS = {
    "formal": ("teacher", "doctor"),
    "casual": ("friend", "cousin"),
}
GREETINGS = {"formal": ("Dear", "Good morning"), "casual": ("Hey", "Hello there")}
FAREWELLS = {
    "formal": ("Yours sincerely", "With kind regards"),
    "casual": ("See you soon", "Lots of love"),
}


def write_demo_pairs(directory: str, n_train: int, n_eval: int, seed: int) -> tuple[str, str]:
    """Write train.jsonl and eval.jsonl, the same bytes for the same arguments.

    The rows of a prompt are consecutive, and no prompt is in both files. A quarter of the prompts
    have three or four drafts, and one pair for every two drafts with different scores.

    Args:
        directory: folder for the files; created if it does not exist.
        n_train: number of pairs in train.jsonl.
        n_eval: number of pairs in eval.jsonl.
        seed: seed of prompts and drafts.

    Returns:
        The paths of train.jsonl and eval.jsonl.

    Raises:
        ValueError: if no new prompt is found for so many pairs.
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
        ValueError: if no new prompt is found for so many pairs.
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
    """Draw a task whose prompt is not in `taken`, and add it; None after `_ATTEMPTS` draws."""
    for _ in range(_ATTEMPTS):
        task = _pick(rng, FAMILIES)(rng)
        if task.prompt not in taken:
            taken.add(task.prompt)
            return task
    return None


def _rated(task: Task, rng: random.Random) -> Iterator[DemoPair]:
    """Draw the drafts of one prompt until two differ in score; yield every pair that does."""
    n_drafts = 2 if rng.random() >= RANKED_SHARE else 3 + int(2 * rng.random())
    scored: dict[str, int] = {}
    while len(scored) < n_drafts or len(set(scored.values())) == 1:
        drawn = [[rng.random() < MEETS for _ in range(REQUIREMENTS)] for _ in range(n_drafts)]
        scored = {task.draft(rng, meets): sum(meets) for meets in drawn}
    for chosen, high in scored.items():
        for rejected, low in scored.items():
            if high > low:
                yield DemoPair(task.prompt, chosen, rejected, task.name)


def _reply(rng: random.Random) -> Task:
    """Answer a customer about the right thing, opening and closing in the tone asked for."""
    item, tone = _pick_contrast(rng, ITEMS), _pick_contrast(rng, TONES)
    prompt = f"{_pick(rng, ASKS).format(_pick(rng, NAMES), item[0])} Write a {tone[0]} reply.\n"

    def draft(rng: random.Random, meets: Sequence[bool]) -> str:
        opening, thing, closing = _choose_options((tone, item, tone), meets)
        return (
            f"{_pick(rng, OPENINGS[opening])} The {thing} {_pick(rng, SITUATIONS)}. "
            f"{_pick(rng, CLOSINGS[closing])}"
        )

    return Task("reply", prompt, draft)


def _letter(rng: random.Random) -> Task:
    """Greet and sign off as the reader's standing asks, about the right topic."""
    name = _pick(rng, NAMES)
    topic, register = _pick_contrast(rng, TOPICS), _pick_contrast(rng, REGISTERS)
    reader = _pick(rng, READERS[register[0]])
    prompt = f"{_pick(rng, NOTES).format(name, reader, topic[0])}\n"

    def draft(rng: random.Random, meets: Sequence[bool]) -> str:
        greeting, thing, farewell = _choose_options((register, topic, register), meets)
        return (
            f"{_pick(rng, GREETINGS[greeting])} {name}, thanks for the {thing}. "
            f"{_pick(rng, FAREWELLS[farewell])}!"
        )

    return Task("letter", prompt, draft)


def _format(rng: random.Random) -> Task:
    """Join a colour and a thing with the joint, the case and the end mark asked for."""
    first, second = _pick(rng, COLOURS), _pick(rng, THINGS)
    asked = [_pick_contrast(rng, options) for options in (JOINTS, CASES, MARKS)]
    joint, case, mark = (right for right, _ in asked)
    prompt = f"Join {first} and {second} with {joint}. Use {case}. End with {mark}.\n"

    def draft(rng: random.Random, meets: Sequence[bool]) -> str:
        between, casing, end = _choose_options(asked, meets)
        text = f"{first}{WRITTEN[between]}{second}{WRITTEN[end]}"
        return text.upper() if casing == "capitals" else text

    return Task("format", prompt, draft)


def _facts(rng: random.Random) -> Task:
    """Say in short what the prompt says about a person."""
    name = _pick(rng, NAMES)
    known = [_pick_contrast(rng, options) for options in (CITIES, PETS, DRINKS)]
    city, pet, drink = (right for right, _ in known)
    prompt = f"{name} lives in {city}, has a {pet} and likes {drink}. In short?\n"

    def draft(rng: random.Random, meets: Sequence[bool]) -> str:
        home, animal, taste = _choose_options(known, meets)
        return f"{home}, a {animal}, {taste}."

    return Task("facts", prompt, draft)


def _diary(rng: random.Random) -> Task:
    """Turn a note into a sentence with the tense, the place and the time that it gives."""
    name, verb = _pick(rng, NAMES), _pick(rng, VERBS)
    noted = [_pick_contrast(rng, options) for options in (DAYS, PLACES, TIMES)]
    day, place, time = (right for right, _ in noted)
    prompt = f"Note: {name}, {verb}, {day}, {place}, {time}. Make it a sentence.\n"

    def draft(rng: random.Random, meets: Sequence[bool]) -> str:
        tense, where, when = (WRITTEN[option] for option in _choose_options(noted, meets))
        return f"{name} {tense.format(verb)} {where} {when}."

    return Task("diary", prompt, draft)


FAMILIES = (_reply, _letter, _format, _facts, _diary)


def _choose_options(asked: Sequence[Contrast], meets: Sequence[bool]) -> tuple[str, ...]:
    """Choose, for each requirement, the option asked for or the one it is mixed up with."""
    return tuple(right if met else wrong for (right, wrong), met in zip(asked, meets, strict=True))


def _pick_contrast(rng: random.Random, contrasts: Sequence[Contrast]) -> Contrast:
    """Pick the option that a prompt asks for, and the one a draft may contain instead."""
    one, other = _pick(rng, contrasts)
    return (one, other) if rng.random() < 0.5 else (other, one)


def _pick(rng: random.Random, options: Sequence[Option]) -> Option:
    """Pick an option with `random()`, the only method that Python keeps reproducible."""
    return options[int(rng.random() * len(options))]
