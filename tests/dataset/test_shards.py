"""Token shards: what is written is what is read, and a set exists once its manifest does."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_ray.dataset.shards import MANIFEST_NAME, Shard, TokenSet, read_shard, write_shard
from orpo_ray.preference.errors import DataError
from orpo_ray.preference.groups import PromptGroup, RowId, TokenIds
from orpo_ray.storage.folder import Folder

IDS = st.lists(st.integers(0, 2**31 - 1), max_size=6)
ROW_IDS = st.builds(RowId, st.integers(0, 2**31 - 1), st.integers(0, 2**63 - 1))


def as_ids(values: list[int]) -> TokenIds:
    return np.asarray(values, dtype=np.int32)


@st.composite
def groups(draw: st.DrawFn) -> PromptGroup:
    completions = draw(st.lists(IDS.filter(bool), min_size=2, max_size=4))
    index = st.integers(0, len(completions) - 1)
    pairs = draw(st.lists(st.tuples(index, index), min_size=1, max_size=3))
    return PromptGroup(
        prompt=as_ids(draw(IDS)),
        completions=tuple(map(as_ids, completions)),
        pairs=tuple(pairs),
        row_ids=tuple(draw(ROW_IDS) for _ in pairs),
    )


def plain(group: PromptGroup) -> tuple[object, ...]:
    completions = [completion.tolist() for completion in group.completions]
    return group.prompt.tolist(), completions, group.pairs, group.row_ids


@settings(deadline=None)
@given(content=st.lists(groups(), max_size=5))
def test_a_shard_gives_back_what_it_was_given(
    tmp_path_factory: pytest.TempPathFactory, content: list[PromptGroup]
) -> None:
    path = tmp_path_factory.mktemp("shard") / "a.parquet"
    shard = write_shard(str(path), content)
    back = read_shard(str(path))
    assert list(map(plain, back)) == list(map(plain, content))
    assert {ids.dtype.name for group in back for ids in (group.prompt, *group.completions)} <= {
        "int32"
    }
    assert shard == Shard(
        name="a.parquet",
        n_groups=len(content),
        n_pairs=sum(len(group.pairs) for group in content),
        n_tokens=sum(group.n_tokens for group in content),
        digest=shard.digest,
    )


def test_the_digest_tells_tokens_lengths_pairs_and_rows_apart(tmp_path: Path) -> None:
    """[7 8 | 9] and [7 | 8 9] have the same tokens; their lengths differ."""

    def digest(prompt: list[int], chosen: list[int], pair: tuple[int, int], row: int) -> str:
        group = PromptGroup(
            as_ids(prompt), (as_ids(chosen), as_ids([3])), (pair,), (RowId(0, row),)
        )
        return write_shard(str(tmp_path / "a.parquet"), [group]).digest

    same = digest([7, 8], [9], (0, 1), 4)
    others = {
        digest([7], [8, 9], (0, 1), 4),
        digest([7, 8], [9], (1, 0), 4),
        digest([7, 8], [9], (0, 1), 5),
        digest([7, 8], [10], (0, 1), 4),
    }
    assert digest([7, 8], [9], (0, 1), 4) == same
    assert len(others - {same}) == 4


PAIR = PromptGroup(
    as_ids([7, 8, 9]), (as_ids([1, 2]), as_ids([3])), ((0, 1), (1, 0)), (RowId(0, 4), RowId(0, 9))
)


def test_tokens_of_a_group_count_the_prompt_once(tmp_path: Path) -> None:
    """3 of prompt, 2 and 1 of answers: 6, and two pairs among them change nothing."""
    assert PAIR.n_tokens == 6
    assert write_shard(str(tmp_path / "a.parquet"), [PAIR] * 5).n_tokens == 30


def test_the_same_groups_are_the_same_bytes_and_nothing_else_is_left(tmp_path: Path) -> None:
    for name in ("a.parquet", "b.parquet", "a.parquet"):
        write_shard(str(tmp_path / name), [PAIR, PAIR])
    assert (tmp_path / "a.parquet").read_bytes() == (tmp_path / "b.parquet").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.parquet", "b.parquet"]


def test_a_shard_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_shard(str(path), [PAIR])
    before = path.read_bytes()
    broken = PromptGroup(as_ids([1]), (as_ids([1]),), ((0, 0),), (RowId(2**40, 0),))
    with pytest.raises((OverflowError, ValueError)):
        write_shard(str(path), [broken])
    assert path.read_bytes() == before


def test_a_set_exists_once_its_manifest_does(tmp_path: Path) -> None:
    shards = (Shard("a.parquet", 2, 3, 40, "aa"), Shard("b.parquet", 1, 1, 9, "bb"))
    tokens = TokenSet(Folder.at(tmp_path), shards, ("/data/\u00e9.jsonl",), {"rows_read": 4})
    assert (tokens.n_groups, tokens.n_pairs) == (3, 4)
    assert TokenSet.load(str(tmp_path)) is None
    tokens.save()
    assert TokenSet.load(str(tmp_path)) == tokens
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]


def test_a_set_that_was_moved_is_read_where_it_is(tmp_path: Path) -> None:
    """The manifest remembers where it was made; the folder it lies in counts."""
    (tmp_path / "old").mkdir()
    TokenSet(Folder.at(tmp_path / "old"), (), ("s",), {}).save()
    (tmp_path / "old").rename(tmp_path / "new")
    moved = TokenSet.load(str(tmp_path / "new"))
    assert moved == TokenSet(Folder.at(tmp_path / "new"), (), ("s",), {})


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    TokenSet(
        Folder.at(tmp_path), (Shard("a.parquet", 1, 1, 6, "aa"),), ("s",), {"rows_read": 1}
    ).save()
    assert json.loads((tmp_path / MANIFEST_NAME).read_text()) == {
        "format": 1,
        "directory": str(tmp_path),
        "shards": [
            {
                "name": "a.parquet",
                "n_groups": 1,
                "n_pairs": 1,
                "n_tokens": 6,
                "digest": "aa",
                "source": -1,
            }
        ],
        "sources": ["s"],
        "report": {"rows_read": 1},
        "held_out": [],
    }


def test_a_set_without_a_format_is_of_the_first_and_of_another_one_it_is_named(tmp_path: Path):
    """The next version may lay out its files in another way, and find this set in the cache."""
    tokens = TokenSet(Folder.at(tmp_path), (), ("s",), {})
    tokens.save()
    content = json.loads((tmp_path / MANIFEST_NAME).read_text())
    del content["format"]
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(content))
    assert TokenSet.load(tmp_path) == tokens
    (tmp_path / MANIFEST_NAME).write_text(json.dumps({"format": 2, "parts": []}))
    with pytest.raises(DataError, match=r"manifest\.json is of format 2, and .* reads 1"):
        TokenSet.load(tmp_path)
    (tmp_path / MANIFEST_NAME).write_text('{"format": 1, "sh')
    with pytest.raises(DataError, match=r"manifest\.json is damaged"):
        TokenSet.load(tmp_path)
