"""Finding the files that paths, globs, folders and URLs name, and listing what is passed over."""

import fnmatch
import glob
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from orpo_ray.preference.errors import DataError
from orpo_ray.preference.reading.saved import STATE, names_in_saved_folders, refuse_saved_splits
from orpo_ray.preference.reading.sources import (
    KINDS_TEXT,
    STREAMED,
    file_fingerprint,
    is_supported,
    remote_file_system,
)
from orpo_ray.preference.reading.splits import TRAIN_SPLIT, are_mixed, find_splits, pattern_of

# Prefix of a bucket's name that asks for access without credentials.
_ANONYMOUS = "anonymous@"
HIDDEN, OTHER_TYPE, EMPTY, METADATA = "hidden", "of other types", "empty", "metadata"
_FOLDERS, _LINKED_FOLDERS, _NO_FILES = "folders", "linked folders", "no plain files"
_UNLISTED = f"not listed in {STATE}"
_METADATA_NAMES = {STATE, "dataset_infos.json", "dataset_info.json", "dataset_dict.json"}
# Text files about a data set, which are not worth a word.
_ABOUT_NAMES = ("readme", "license", "licence", "citation", ".gitattributes", ".gitignore")
_NO_WILDCARDS: tuple[str, ...] = ()
_SHOWN_NAMES, _KEPT_NAMES = 3, 20
PassedOver = Mapping[str, tuple[int, Sequence[str]]]
"""By reason: how many files (or whole folders, ending in `/`), and the names of the first."""


@dataclass(frozen=True)
class FoundFiles:
    """The files that some patterns name.

    Args:
        files: absolute paths and URLs, without repeats.
        passed_over: files in the folders, or matched by the globs, that are not read.
        splits: of the files that were found through folders and globs; "" for those of none.
    """

    files: tuple[str, ...]
    passed_over: PassedOver
    splits: frozenset[str] = frozenset()


def find_files(patterns: Sequence[str]) -> list[str]:
    """Return `search_files(patterns).files` as a list."""
    return list(search_files(patterns).files)


def search_files(patterns: Sequence[str]) -> FoundFiles:
    """Resolve paths, globs, folders and URLs to files, without repeats.

    The files of one pattern are sorted; those of a folder written by `datasets.save_to_disk` keep
    their order. A file that is named by itself is always read. Of folders and globs, hidden files,
    other types, metadata and empty files are passed over.

    Raises:
        DataError: with every pattern that matches no file that can be read, every unsupported or
            empty file that is named by itself, and every folder that mixes splits.
    """
    found: dict[str, str] = {}
    reasons: dict[str, dict[str, None]] = defaultdict(dict)
    splits: set[str] = set()
    problems: list[str] = []
    for pattern in patterns:
        try:
            listing = _list_remote(pattern) if "://" in pattern else _list_local(pattern)
            files, passed_over, parts = _select(pattern, listing)
        except DataError as error:
            problems += error.lines
            continue
        except Exception as error:
            # Every file system raises its own exceptions; those of aiohttp are no OSError.
            problems.append(f"{pattern}: cannot be listed: {type(error).__name__}: {error}")
            continue
        for path in files:
            found.setdefault(path if "://" in path else str(Path(path).resolve()), path)
        for reason, names in passed_over.items():
            reasons[reason] |= dict.fromkeys(names)
        splits |= set(parts)
    if problems:
        raise DataError(problems)
    return FoundFiles(tuple(found.values()), _first_names(reasons), frozenset(splits))


def merge_passed_over(parts: Iterable[PassedOver]) -> PassedOver:
    """Add up what several searches passed over."""
    merged: dict[str, tuple[int, tuple[str, ...]]] = {}
    for part in parts:
        for reason, (number, names) in part.items():
            before, earlier = merged.get(reason, (0, ()))
            merged[reason] = (before + number, (*earlier, *names)[:_KEPT_NAMES])
    return merged


def passed_over_text(passed_over: PassedOver) -> str:
    """On one line: how many files were passed over for every reason, and the first names."""
    texts = []
    for reason, (number, names) in passed_over.items():
        more = ", ..." if number > len(names[:_SHOWN_NAMES]) else ""
        texts.append(f"{number} {reason} ({', '.join(names[:_SHOWN_NAMES])}{more})")
    return ", ".join(texts)


def _first_names(reasons: Mapping[str, Iterable[str]]) -> PassedOver:
    counted = {}
    for reason, names in reasons.items():
        listed = list(names)
        # A name from a downloaded folder may hold characters that a terminal acts on.
        shown = tuple(name if name.isprintable() else repr(name) for name in listed[:_KEPT_NAMES])
        counted[reason] = (len(listed), shown)
    return counted


@dataclass(frozen=True)
class _Listing:
    """What one pattern matches.

    Args:
        prefix: the folder with a `/` at its end, or the part of a glob before its first wildcard,
            or the path of the one file whose name is then "".
        sizes: size in bytes (None if unknown) of every file by its name after `prefix`; folders
            that are not searched end in `/`.
        wildcards: the parts of a glob from its first wildcard on; empty for a folder.
        no_files: names of links to nothing, sockets and the like.
        open_in: opens a file by its name to read bytes.
    """

    prefix: str
    sizes: Mapping[str, int | None]
    wildcards: tuple[str, ...] = ()
    no_files: frozenset[str] = frozenset()
    open_in: Callable[[str], Any] = open

    @property
    def is_one_file(self) -> bool:
        """Whether the pattern is the path of a file."""
        return "" in self.sizes


def _list_local(pattern: str) -> _Listing:
    # Symlinks are not resolved: in the hub's cache they point to files without a suffix.
    expanded = os.path.abspath(Path(pattern).expanduser())
    if os.path.isfile(expanded):  # its name may contain wildcards
        return _Listing(expanded, {"": file_fingerprint(expanded)[0]})
    prefix, wildcards = f"{expanded.rstrip('/')}/", _NO_WILDCARDS
    if os.path.isdir(expanded):
        names = _names_below(expanded)
    else:
        prefix, wildcards = _cut_glob(expanded)
        matches = glob.glob(expanded, recursive=True, include_hidden=True)
        names = [match.rstrip("/")[len(prefix) :] + "/" * os.path.isdir(match) for match in matches]
    paths = {name: prefix + name for name in sorted(names) if name.strip("/")}
    plain = {name for name, path in paths.items() if os.path.isfile(path)}
    sizes = {name: os.stat(path).st_size if name in plain else 0 for name, path in paths.items()}
    return _Listing(
        prefix,
        sizes,
        wildcards,
        no_files=frozenset(name for name in paths if name not in plain and name[-1] != "/"),
        open_in=lambda name: open(prefix + name, "rb"),
    )


def _names_below(folder: str) -> list[str]:
    """Names of all files below a folder, and with `/` at the end of folders not descended into.

    Raises:
        OSError: for a folder that may not be listed.
    """

    def fail(error: OSError) -> None:
        raise error

    names = []
    for parent, folders, files in os.walk(folder, onerror=fail):
        below = "" if parent == folder else f"{os.path.relpath(parent, folder)}/"
        skipped = [
            name
            for name in folders
            if _is_hidden(name) or os.path.islink(os.path.join(parent, name))
        ]
        folders[:] = [name for name in folders if name not in skipped]
        names += [f"{below}{name}" for name in files] + [f"{below}{name}/" for name in skipped]
    return names


def _list_remote(pattern: str) -> _Listing:
    """List a URL, with a glob or of a folder, on its file system."""
    system, path = remote_file_system(pattern)
    protocol, _, rest = pattern.partition("://")
    head = f"{protocol}://{_ANONYMOUS if rest.startswith(_ANONYMOUS) else ''}"
    if pattern.startswith(STREAMED):  # isdir and glob would download the page
        return _Listing(pattern, {"": file_fingerprint(path)[0]} if system.exists(path) else {})
    prefix, wildcards = f"{path.rstrip('/')}/", _NO_WILDCARDS
    if system.isdir(path):
        entries = system.find(path.rstrip("/"), detail=True)
    elif system.exists(path):
        return _Listing(f"{head}{path}", {"": system.info(path).get("size")})
    else:
        prefix, wildcards = _cut_glob(path)
        entries = system.glob(path, detail=True)
    sizes = {
        name.removeprefix(prefix) + "/" * (info.get("type") == "directory"): info.get("size")
        for name, info in sorted(entries.items())
    }
    return _Listing(
        f"{head}{prefix}",
        {name: size for name, size in sizes.items() if name.strip("/")},
        wildcards,
        open_in=lambda name: system.open(prefix + name, "rb"),
    )


def _cut_glob(pattern: str) -> tuple[str, tuple[str, ...]]:
    """Cut a glob before its first part with a wildcard."""
    parts = pattern.split("/")
    first = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return "".join(f"{part}/" for part in parts[:first]), tuple(parts[first:])


def _select(
    pattern: str, listing: _Listing
) -> tuple[list[str], dict[str, list[str]], dict[str, list[str]]]:
    """Choose the files to read: their paths, names passed over by reason, and the splits.

    Raises:
        DataError: when there is none to read, or when the folder mixes splits.
    """
    if listing.is_one_file:
        _refuse_unreadable(listing.prefix, listing.sizes[""])
        return [listing.prefix], {}, {}
    saved: Mapping[str, Sequence[str]] = {}
    if not listing.wildcards:
        refuse_saved_splits(listing.prefix, listing.sizes, listing.open_in)
        saved = names_in_saved_folders(listing.prefix, listing.sizes, listing.open_in)
    passed_over: dict[str, dict[str, None]] = defaultdict(dict)
    names: list[str] = []
    for name in listing.sizes:
        reason, shown = _reason_to_pass(name, listing, saved)
        if reason is None:
            names.append(name)
        elif shown:
            passed_over[reason][shown] = None
    if not names:
        raise DataError([_nothing_text(pattern, listing, _first_names(passed_over))])
    splits = find_splits(names)
    if are_mixed(splits):
        raise DataError([_mixed_text(pattern, listing.prefix, splits)])
    files = [listing.prefix + name for name in _in_saved_order(names, saved)]
    return files, {reason: list(shown) for reason, shown in passed_over.items()}, splits


def _refuse_unreadable(path: str, n_bytes: int | None) -> None:
    """Refuse a file that is named by itself, as far as its name and size tell."""
    if not is_supported(path):
        raise DataError([f"{path}: not a supported file type ({KINDS_TEXT})"])
    if n_bytes == 0:
        raise DataError([f"{path}: is empty"])


def _nothing_text(pattern: str, listing: _Listing, passed_over: PassedOver) -> str:
    if passed_over:
        return (
            f"{pattern}: nothing to read; passed over: {passed_over_text(passed_over)}; "
            f"files that are read end in {KINDS_TEXT}"
        )
    is_folder = listing.prefix.endswith("/") and not listing.wildcards
    what = f"no file in it ends in {KINDS_TEXT}" if is_folder else "no such file or folder"
    return f"{pattern}: {what}"


def _mixed_text(pattern: str, prefix: str, splits: Mapping[str, Sequence[str]]) -> str:
    """Say which splits a folder holds, and how to name one."""
    named = sorted((split for split in splits if split), key=lambda split: split != TRAIN_SPLIT)
    beside = f" beside files of no split ({splits[''][0]})" if "" in splits else ""
    ways = [prefix + pattern_of(splits, split) for split in (*named, *([""] if beside else []))]
    return (
        f"{pattern}: contains the split{'s' * (len(named) > 1)} {', '.join(named)}{beside}, which "
        f"are not read as one set: give one of {', '.join(ways)}"
    )


def _reason_to_pass(
    name: str, listing: _Listing, saved: Mapping[str, Sequence[str]]
) -> tuple[str | None, str]:
    """Why a file is passed over, None if it is read, and what to show of it, "" for nothing."""
    path = PurePosixPath(name)
    base = path.name.lower()
    is_about = base.startswith(_ABOUT_NAMES)
    hidden = _hidden_part(path.parts, listing.wildcards)
    if hidden:
        whole = "/".join(path.parts[:hidden])
        return HIDDEN, "" if is_about and whole == name else whole + "/" * (whole != name)
    if name.endswith("/"):
        recursive = "**" in listing.wildcards  # then the files in it are matched as well
        return _FOLDERS if listing.wildcards else _LINKED_FOLDERS, "" if recursive else name
    if name in listing.no_files:
        return _NO_FILES, name
    if base in _METADATA_NAMES:
        return METADATA, name
    if not is_supported(name):
        return OTHER_TYPE, "" if is_about else name
    folder = next((folder for folder in saved if name.startswith(folder)), None)
    if folder is not None and name not in saved[folder]:
        return _UNLISTED, name
    return (EMPTY, name) if listing.sizes[name] == 0 else (None, name)


def _is_hidden(name: str) -> bool:
    """Whether a name is one that Spark and pyarrow pass over; `_a=1` is a partition."""
    return name.startswith(".") or (name.startswith("_") and "=" not in name)


def _hidden_part(parts: Sequence[str], wildcards: Sequence[str]) -> int:
    """Number of the first hidden part of a path that the glob does not name, from 1; 0 for none."""
    named = [wildcard for wildcard in wildcards if _is_hidden(wildcard)]
    for number, part in enumerate(parts, 1):
        if _is_hidden(part) and not any(fnmatch.fnmatchcase(part, wildcard) for wildcard in named):
            return number
    return 0


def _in_saved_order(names: Sequence[str], saved: Mapping[str, Sequence[str]]) -> list[str]:
    """Put the files of every saved folder into the order that it lists them in."""
    ordered = list(names)
    for listed in saved.values():
        ranks = {name: rank for rank, name in enumerate(listed)}
        places = [place for place, name in enumerate(ordered) if name in ranks]
        chosen = sorted((ordered[place] for place in places), key=ranks.__getitem__)
        for place, name in zip(places, chosen, strict=True):
            ordered[place] = name
    return ordered
