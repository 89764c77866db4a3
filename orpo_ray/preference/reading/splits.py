"""Recognizing the splits of a data set (train, validation, test) by the names of its files."""

import glob
import itertools
import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from orpo_ray.preference.reading.sources import COMPRESSIONS, KINDS, is_supported

TRAIN_SPLIT = "train"
_SPLITS = {
    **dict.fromkeys(("train", "training"), TRAIN_SPLIT),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
    **dict.fromkeys(("eval", "evaluation"), "eval"),
}
_OF_SHARDS = re.compile(r"\d+[-_. ]of[-_. ]\d+")
_WORD = re.compile(r"[^\W\d_]+")


@dataclass(frozen=True)
class _Part:
    """A file or folder whose name contains the name of a split.

    Args:
        split: which one.
        path: of the file or folder, below the folder that is searched.
        rest: the name's other words, after the folder that it lies in.
    """

    split: str
    path: str
    rest: tuple[str, ...]


def find_splits(names: Sequence[str]) -> dict[str, list[str]]:
    """Group files by the split that they are of; "" for those of none.

    `train-00000-of-00002.parquet`, `split=test/a.jsonl` and `dev/a.jsonl` are of a split. A name
    with other words in it, such as `train_prefs.jsonl`, is of one only where another split has a
    file of the same words, or where other names leave no doubt that there are splits. So
    `test_cases.jsonl` alone is of none.

    Args:
        names: paths below one folder, with `/`.

    Returns:
        For every split the files, or the folders that hold all of its files.
    """
    sure = {name: part for name in names if (part := _sure_part(name))}
    doubtful = {name: parts for name in names if name not in sure and (parts := _parts(name))}
    splits_of_rest: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for name in names:
        for part in doubtful.get(name, ()):
            splits_of_rest[part.rest].add(part.split)
        for rest in () if name in sure else _plain_rests(name):
            splits_of_rest[rest].add("")
    known = {part.split for part in sure.values()}.union(
        *filter(are_mixed, splits_of_rest.values())
    ) - {""}
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for name in names:
        accepted = [sure[name]] if name in sure else []
        for part in doubtful.get(name, ()):
            if are_mixed(splits_of_rest[part.rest]) or known - {part.split}:
                accepted.append(part)
        split, path = (accepted[0].split, accepted[0].path) if accepted else ("", name)
        found[split][path] = None
    return {split: list(paths) for split, paths in found.items()}


def are_mixed(splits: Collection[str]) -> bool:
    """Whether files of several splits, or of one for evaluation and of none, are together."""
    return len(splits) > 1 and set(splits) != {TRAIN_SPLIT, ""}


def pattern_of(splits: Mapping[str, Sequence[str]], split: str) -> str:
    """A path or glob that matches files of one split (all of them, if that is one) and no others.

    Args:
        splits: from `find_splits`.
        split: one of them.
    """
    paths = splits[split]
    first, last = min(paths), max(paths)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    shared = glob.escape(first[: sum(1 for _ in same)])
    others = [path for name, part in splits.items() if name != split for path in part]
    clear = shared and not any(path.startswith(shared) for path in others)
    one_folder = all(is_supported(path) and "/" not in path[len(shared) :] for path in paths)
    return f"{shared}*" if len(paths) > 1 and clear and one_folder else paths[0]


def _words(component: str) -> list[str]:
    """The words of a file's or folder's name, without suffixes and numbers."""
    name = component.lower()
    for suffix in (*COMPRESSIONS, *KINDS):
        name = name.removesuffix(suffix)
    return _WORD.findall(_OF_SHARDS.sub("", name))


def _parts(name: str) -> list[_Part]:
    """The parts of a path that contain the name of a split."""
    parts, components = [], name.split("/")
    for index, component in enumerate(components):
        words = _words(component)
        split_word = next((word for word in words if word in _SPLITS), None)
        if split_word:
            words.remove(split_word)
            rest = (*components[:index], "", *(word for word in words if word != "split"))
            parts.append(_Part(_SPLITS[split_word], "/".join(components[: index + 1]), rest))
    return parts


def _sure_part(name: str) -> _Part | None:
    """The first part of a path whose name has no other words than that of a split."""
    return next((part for part in _parts(name) if part.rest[-1:] == ("",)), None)


def _plain_rests(name: str) -> list[tuple[str, ...]]:
    """What `_Part.rest` would be of the parts of a path that contain no name of a split."""
    components = name.split("/")
    rests = []
    for index, component in enumerate(components):
        words = _words(component)
        if words and not any(word in _SPLITS for word in words):
            rests.append((*components[:index], "", *words))
    return rests
