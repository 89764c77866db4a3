"""Finding files, and what is passed over on the way."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import fsspec
import pytest

from orpo_ray.preference.errors import DataError
from orpo_ray.preference.reading.finding import (
    find_files,
    merge_passed_over,
    passed_over_text,
    search_files,
)
from orpo_ray.preference.reading.readers import read_split
from orpo_ray.preference.reading.rows import Split

ROW = '{"prompt": "p", "chosen": "yes", "rejected": "no"}\n'
Place = Callable[[dict[str, str]], str]


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    """Writes files by name into a folder here, or in a file system of fsspec; gives its address."""

    def write(files: dict[str, str]) -> str:
        if request.param == "memory":
            memory = fsspec.filesystem("memory")
            memory.store.clear()
            for name, text in files.items():
                memory.pipe(f"/some/data/{name}", text.encode())
            return "memory://some/data"
        for name, text in files.items():
            path = tmp_path / "data" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return str(tmp_path / "data")

    return write


def of_rows(*names: str) -> dict[str, str]:
    return dict.fromkeys(names, ROW)


def names_of(files: Any, folder: str) -> list[str]:
    """Names below a folder; fsspec's memory has paths that begin with a slash."""
    tail = folder.rpartition("://")[2]
    return [path.partition(f"{tail}/")[2] for path in files]


def test_a_folder_that_datasets_saved_has_its_files_in_their_order(tmp_path: Path) -> None:
    saved = datasets.Dataset.from_list([{"a": i} for i in range(30)])
    saved.save_to_disk(tmp_path / "saved", num_shards=12)
    files = find_files([str(tmp_path / "saved")])
    rows = [raw.record for path in files for raw in read_split(Split(path))]
    assert rows == [{"a": i} for i in range(30)]
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(tmp_path / "splits")
    with pytest.raises(DataError, match="contains the splits train, test; give the folder"):
        find_files([str(tmp_path / "splits")])
    assert len(find_files([str(tmp_path / "splits" / "test")])) == 1
    remote = [f"file://{path}" for path in files]
    assert find_files([f"file://{tmp_path}/saved"]) == remote
    with pytest.raises(DataError, match="contains the splits train, test; give the folder"):
        find_files([f"file://{tmp_path}/splits"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "state.json").write_text('{"a": 1}')
    with pytest.raises(DataError, match=r"nothing to read; passed over: 1 metadata \(state.json\)"):
        find_files([str(tmp_path / "other")])


def test_hidden_files_are_passed_over_wherever_they_are(place: Place) -> None:
    """Names that begin with a dot or an underscore, as in Spark; `_a=1` is a partition."""
    hidden = of_rows("_draft.csv", "x/.cache/b.jsonl", "x/.cache/c.jsonl", "__MACOSX/._a.jsonl")
    hidden |= {"_delta_log/00.json": "{}", "_SUCCESS": "", "x/.a.jsonl.crc": "7"}
    folder = place(of_rows("a.jsonl", "x/b_.jsonl", "_day=1/c.jsonl", "x/.../d.jsonl") | hidden)
    found = search_files([folder])
    assert names_of(found.files, folder) == ["_day=1/c.jsonl", "a.jsonl", "x/b_.jsonl"]
    shown = {"_draft.csv", "x/.cache/", "__MACOSX/", "_delta_log/", "_SUCCESS", "x/.a.jsonl.crc"}
    number, first = found.passed_over["hidden"]
    assert (number, set(first)) == (7, shown | {"x/.../"})
    found = search_files([f"{folder}/**/*.jsonl"])
    assert set(names_of(found.files, folder)) >= {"a.jsonl", "x/b_.jsonl"}
    assert not any("/." in name or "MACOSX" in name for name in names_of(found.files, folder))


def test_a_hidden_file_is_read_where_it_is_named(place: Place) -> None:
    folder = place(of_rows("_a.jsonl", ".b.jsonl", "c.jsonl", ".deep/d.jsonl", ".deep/_e.jsonl"))
    for name in ("_a.jsonl", ".b.jsonl", ".deep/_e.jsonl"):
        assert names_of(find_files([f"{folder}/{name}"]), folder) == [name]
    for pattern, expected in {
        "_*.jsonl": ["_a.jsonl"],
        ".b*": [".b.jsonl"],
        ".deep": [".deep/d.jsonl"],
        ".deep/*": [".deep/d.jsonl"],
        ".d*/*.jsonl": [".deep/d.jsonl"],
        "*.jsonl": ["c.jsonl"],
    }.items():
        assert names_of(find_files([f"{folder}/{pattern}"]), folder) == expected


def test_what_is_not_read_is_listed(place: Place) -> None:
    files = of_rows("a.JSONL", "b.Csv.GZ", "c.parquet.zip", "notes.txt", "x/sheet.xlsx", "d.bak")
    files |= {"README.md": "", "LICENSE": "", ".gitattributes": "", "dataset_infos.json": "{}"}
    folder = place(files | {"e.jsonl": "", "f.parquet": ""})
    for pattern, deep in ((folder, ["x/sheet.xlsx"]), (f"{folder}/*", [])):
        found = search_files([pattern])
        assert names_of(found.files, folder) == ["a.JSONL", "b.Csv.GZ"]
        others = ("c.parquet.zip", "d.bak", "notes.txt", *deep)
        passed_over = {
            "of other types": (len(others), others),
            "empty": (2, ("e.jsonl", "f.parquet")),
            "metadata": (1, ("dataset_infos.json",)),
        }
        if not deep:
            passed_over["folders"] = (1, ("x/",))
        assert found.passed_over == passed_over
    with pytest.raises(DataError, match=r"/e\.jsonl: is empty"):
        find_files([f"{folder}/e.jsonl"])
    with pytest.raises(DataError, match=r"nothing to read; passed over: 2 empty \(e.jsonl, f.par"):
        find_files([f"{folder}/[ef].*"])
    assert names_of(find_files([f"{folder}/dataset_infos.json"]), folder) == ["dataset_infos.json"]


def test_passed_over_files_are_said_on_one_line() -> None:
    parts = [{"hidden": (2, ("a", "b"))}, {"hidden": (30, ("c", "d")), "empty": (1, ("e",))}]
    text = passed_over_text(merge_passed_over(parts))
    assert text == "32 hidden (a, b, c, ...), 1 empty (e)"


def test_a_name_with_control_characters_is_quoted(tmp_path: Path) -> None:
    for name in ("a.jsonl", "\x1b[2Jb.txt"):
        (tmp_path / name).write_text(ROW)
    assert search_files([str(tmp_path)]).passed_over == {
        "of other types": (1, ("'\\x1b[2Jb.txt'",))
    }


def test_links_to_folders_and_to_nothing_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.jsonl").write_text(ROW)
    (tmp_path / "data" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "gone.jsonl").symlink_to(tmp_path / "nowhere")
    found = search_files([str(tmp_path / "data")])
    assert names_of(found.files, str(tmp_path / "data")) == ["a.jsonl"]
    assert found.passed_over == {
        "no plain files": (1, ("gone.jsonl",)),
        "linked folders": (1, ("linked/",)),
    }


MIXED = {
    "hub": ["data/train-00000-of-00002.csv", "data/train-00001-of-00002.csv", "data/test-0.csv"],
    "flat": ["train.jsonl", "test.jsonl"],
    "capitals": ["TRAIN.jsonl", "Validation.jsonl"],
    "folders": ["train/a.jsonl", "train/b.jsonl", "dev/a.jsonl"],
    "partitions": ["split=train/a.jsonl", "split=eval/a.jsonl"],
    "kinds": ["train_prefs-00000-of-00001.csv", "test_prefs-00000-of-00001.csv"],
    "languages": ["en/train/a.jsonl", "de/train/a.jsonl", "de/test/a.jsonl"],
    "suffixed": ["harmless-train.jsonl", "helpful-train.jsonl", "helpful-test.jsonl"],
    "one of none": ["pairs.jsonl", "more.jsonl", "test.jsonl"],
    "named after": ["pairs.jsonl", "pairs_eval.jsonl"],
    "two for evaluation": ["validation.jsonl", "test.jsonl"],
}


@pytest.mark.parametrize("layout", MIXED)
def test_splits_are_not_read_as_one(place: Place, layout: str) -> None:
    """And each way to name one that the error gives finds files of one split."""
    folder = place(of_rows(*MIXED[layout]) | {"README.md": ""})
    with pytest.raises(DataError, match=r"contains the split.*, which are not read as") as caught:
        find_files([folder])
    (line,) = caught.value.lines
    ways = line.partition("give one of ")[2].split(", ")
    assert len(ways) == 2
    first, second = (set(find_files([way])) for way in ways)
    assert first
    assert second
    assert not first & second
    if layout in ("hub", "flat", "folders", "kinds"):
        assert len(first | second) == len(MIXED[layout])
    with pytest.raises(DataError, match="contains the split"):
        find_files([f"{folder}/**/*.*"])


@pytest.mark.parametrize(
    "names",
    [
        ["contest.jsonl", "latest.jsonl", "training_notes.jsonl"],
        ["test_cases.jsonl", "chats.jsonl"],
        ["train.jsonl", "more.jsonl"],
        ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"],
        ["test-00000-of-00002.jsonl", "test-00001-of-00002.jsonl"],
        ["constrain.jsonl", "values/a.jsonl", "evaluated.jsonl", "device.jsonl"],
        ["train/a.jsonl", "train/b/c.jsonl"],
        ["train.jsonl", "_test.jsonl", "test.txt", ".test/a.jsonl"],
    ],
)
def test_words_in_another_sense_are_no_splits(place: Place, names: list[str]) -> None:
    read = [name for name in names if name[0] not in "._" and not name.endswith(".txt")]
    folder = place(of_rows(*names))
    assert sorted(names_of(find_files([folder]), folder)) == sorted(read)


def test_an_empty_part_is_no_part(place: Place) -> None:
    folder = place(of_rows("train.jsonl") | {"test.jsonl": ""})
    assert search_files([folder]).splits == {"train"}
    assert search_files([folder]).passed_over == {"empty": (1, ("test.jsonl",))}


def test_a_saved_folder_lists_what_is_read_at_any_depth(place: Place) -> None:
    state = json.dumps({"_data_files": [{"filename": "z.arrow"}, {"filename": "a.arrow"}]})
    names = ("a.arrow", "z.arrow", "cache-1.arrow")
    folder = place(
        {f"one/{name}": ROW for name in names} | {"one/state.json": state} | of_rows("b")
    )
    found = search_files([folder])
    assert names_of(found.files, folder) == ["one/z.arrow", "one/a.arrow"]
    assert found.passed_over["not listed in state.json"] == (1, ("one/cache-1.arrow",))


@pytest.mark.parametrize(
    "name",
    [
        *("../secret.jsonl", "/etc/secret.jsonl", "deep/b.jsonl", "..", "", "gone.arrow", 7, None),
        *("C:\\secret.jsonl", "..\\secret.jsonl", "a.jsonl::file:///etc/b.jsonl", "s3://b/c.jsonl"),
    ],
)
def test_a_downloaded_folder_names_no_file_elsewhere(place: Place, name: Any) -> None:
    state = json.dumps({"_data_files": [{"filename": "a.jsonl"}, {"filename": name}]})
    folder = place(of_rows("d/a.jsonl", "d/deep/b.jsonl", "secret.jsonl") | {"d/state.json": state})
    with pytest.raises(DataError, match=r"d/state\.json: lists .*of.* this folder") as caught:
        find_files([f"{folder}/d"])
    assert len(caught.value.lines) == 1


@pytest.mark.parametrize("content", ['"a.jsonl"', "[3]", "null", '{"filename": "../a.jsonl"}'])
def test_a_state_of_another_form_is_refused(place: Place, content: str) -> None:
    state = f'{{"_data_files": {content}}}'
    with pytest.raises(DataError, match=r"state\.json: lists .*which is not the name"):
        find_files([place(of_rows("a.jsonl") | {"state.json": state})])


def test_a_link_of_a_saved_folder_leads_no_further_than_a_hub_cache(tmp_path: Path) -> None:
    cache, state = tmp_path / "datasets--a--b", {"_data_files": [{"filename": "a.arrow"}]}
    saved = cache / "snapshots" / "1f"
    saved.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for path in (cache / "blobs" / "77", tmp_path / "secret"):
        path.write_text(ROW)
    (saved / "state.json").write_text(json.dumps(state))
    (saved / "a.arrow").symlink_to(cache / "blobs" / "77")
    assert find_files([str(saved)]) == [f"{saved}/a.arrow"]
    (saved / "a.arrow").unlink()
    (saved / "a.arrow").symlink_to(tmp_path / "secret")
    with pytest.raises(DataError, match=r"state\.json: lists a\.arrow, which is no file of this"):
        find_files([str(saved)])


def make_files(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


def test_folders_globs_and_paths(tmp_path: Path) -> None:
    """Sorted within a pattern, patterns in their order, each file once, other files left alone."""
    make_files(tmp_path, "b.jsonl", "a.json", "deep/c.parquet", "deep/d.jsonl.gz", "README.md")
    make_files(tmp_path, "z[1].json.gz")

    def names(*patterns: str) -> list[str]:
        found = find_files([str(tmp_path / pattern) for pattern in patterns])
        return [str(Path(path).relative_to(tmp_path)) for path in found]

    everything = ["a.json", "b.jsonl", "deep/c.parquet", "deep/d.jsonl.gz", "z[1].json.gz"]
    assert names(".") == everything
    assert names("*.json*") == ["a.json", "b.jsonl", "z[1].json.gz"]
    assert names("**/*.parquet") == ["deep/c.parquet"]
    assert names("z[1].json.gz") == ["z[1].json.gz"]
    mixed = names("deep", "b.jsonl", ".", "a.json")
    assert mixed == ["deep/c.parquet", "deep/d.jsonl.gz", "b.jsonl", "a.json", "z[1].json.gz"]


def test_relative_paths_and_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_files(tmp_path, "a.jsonl")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_files(["a.jsonl", "./a.jsonl", "~/a.jsonl", "*.jsonl"]) == [
        str(tmp_path / "a.jsonl")
    ]


def test_a_link_has_its_own_name_and_is_no_second_file(tmp_path: Path) -> None:
    """As in the cache of the hub, whose files are links to names without a suffix."""
    (tmp_path / "blob").write_text("{}")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "train.jsonl").symlink_to(tmp_path / "blob")
    (tmp_path / "again.jsonl").symlink_to(tmp_path / "blob")
    link = str(tmp_path / "snapshot" / "train.jsonl")
    assert find_files([str(tmp_path / "snapshot")]) == [link]
    assert find_files([link, str(tmp_path / "again.jsonl")]) == [link]


def test_two_names_of_one_file_are_one_file(tmp_path: Path) -> None:
    """Else its rows would be trained twice an epoch."""
    make_files(tmp_path, "a.jsonl", "deep/b.jsonl")
    patterns = [str(tmp_path / "a.jsonl"), str(tmp_path / "deep" / ".." / "a.jsonl")]
    assert find_files(patterns) == [str(tmp_path / "a.jsonl")]


def test_all_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    make_files(tmp_path, "a.jsonl", "notes.txt")
    (tmp_path / "empty.jsonl").touch()
    patterns = ["gone.jsonl", "a.jsonl", "*.csv", "notes.txt", "empty.jsonl"]
    with pytest.raises(DataError) as caught:
        find_files([str(tmp_path / pattern) for pattern in patterns])
    gone, csv, notes, empty = caught.value.lines
    assert gone == f"{tmp_path}/gone.jsonl: no such file or folder"
    assert csv == f"{tmp_path}/*.csv: no such file or folder"
    assert notes.startswith(f"{tmp_path}/notes.txt: not a supported file type (.jsonl, ")
    assert empty == f"{tmp_path}/empty.jsonl: is empty"
