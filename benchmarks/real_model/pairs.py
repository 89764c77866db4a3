"""The pairs of the benchmark: read, made into messages, held to a length, split by prompt."""

import json
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from orpo_ray.preference.pairing import as_messages, normalise
from orpo_ray.preference.reading.readers import read_split
from orpo_ray.preference.reading.rows import Split
from orpo_ray.preference.records import ASSISTANT, USER, Content, Message, Refusal

_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": USER, "Assistant": ASSISTANT}
DEV_SHARE = 1 / 6
Pair = Mapping[str, list[Message]]


def read_pairs(file: str) -> Iterator[Pair]:
    """The usable pairs of a file as prompt, chosen and rejected messages."""
    for raw in read_split(Split(file)):
        record = normalise(raw.record or {})
        if isinstance(record, Refusal):
            continue
        prompt = _as_turns(record.prompt)
        answers = [_answer(side) for side in (record.chosen, record.rejected)]
        if prompt and all(answers):
            yield {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}


def _as_turns(prompt: Content) -> list[Message]:
    """The turns of a dialogue in text (hh-rlhf), without the empty one that is to be answered."""
    if not isinstance(prompt, str) or not prompt.startswith("\n\nHuman:"):
        return [message for message in as_messages(prompt, USER) if message["content"].strip()]
    _, *parts = _TURN.split(prompt)
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": _ROLES[name], "content": text.strip()} for name, text in turns if text.strip()]


def _answer(side: Content) -> list[Message]:
    if not isinstance(side, str):
        return list(side)
    return [{"role": ASSISTANT, "content": side.strip()}] if side.strip() else []


def prompt_key(pair: Pair) -> str:
    """Equal for pairs of one prompt."""
    return json.dumps(pair["prompt"], sort_keys=True)


def up_to(pairs: Iterable[Pair], max_tokens: int, tokenizer: Any) -> list[Pair]:
    """Those of which prompt and either answer have at most so many tokens, the last one included.

    Args:
        pairs: to choose from.
        max_tokens: of a prompt with one answer.
        tokenizer: with a chat template.
    """

    def length(pair: Pair) -> int:
        text = tokenizer.apply_chat_template(
            pair["prompt"], tokenize=False, add_generation_prompt=True
        )
        n_prompt, *n_answers = (
            len(tokenizer(part, add_special_tokens=False)["input_ids"])
            for part in (text, *(pair[side][-1]["content"] for side in ("chosen", "rejected")))
        )
        return n_prompt + max(n_answers) + 1

    return [pair for pair in pairs if length(pair) <= max_tokens]


def split(
    pairs: Sequence[Pair], share: float = DEV_SHARE, seed: int = 0
) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, in random order, and those of a share of the prompts, split off."""
    keys = sorted({prompt_key(pair) for pair in pairs})
    rng = random.Random(seed)
    rng.shuffle(keys)
    apart = set(keys[: round(share * len(keys))])
    train = [pair for pair in pairs if prompt_key(pair) not in apart]
    rng.shuffle(train)
    return train, [pair for pair in pairs if prompt_key(pair) in apart]


def make_files(
    folder: Path,
    sources: Mapping[str, str],
    fits: Callable[[Iterable[Pair]], list[Pair]],
    limits: Mapping[str, int | None],
) -> dict[str, int]:
    """Write train.jsonl, dev.jsonl and held-out.jsonl.

    Args:
        folder: where.
        sources: files of pairs, by `train` and `held-out`.
        fits: chooses the pairs that are short enough.
        limits: maximum number of pairs, by the same names; None for all.

    Returns:
        Pairs by name of the file, and what of the held-out ones is left out, as `overlap`.

    Raises:
        SystemExit: when a file has no pair that is left.
    """
    train, dev = split(fits(read_pairs(sources["train"])))
    trained = {prompt_key(pair) for pair in (*train, *dev)}
    found = fits(read_pairs(sources["held-out"]))
    held_out = [pair for pair in found if prompt_key(pair) not in trained]
    parts = {
        "train": train[: limits["train"]],
        "dev": dev,
        "held-out": held_out[: limits["held-out"]],
    }
    for name, pairs in parts.items():
        if not pairs:
            source = sources["held-out" if name == "held-out" else "train"]
            raise SystemExit(f"{source}: no pair is left for {name}: give a file with more pairs")
        lines = (json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    counts = {name: len(pairs) for name, pairs in parts.items()}
    return counts | {"overlap": len(found) - len(held_out)}
