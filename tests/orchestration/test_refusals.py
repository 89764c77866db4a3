"""Data as people have it, through the real commands: every row is trained on or accounted for."""

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

TEXT = {"prompt": "p: ", "chosen": "yes", "rejected": "no"}
DIALOGUE = "\n\nHuman: hi\n\nAssistant:"


def says(role: str | None, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def chat(**changes: Any) -> dict[str, Any]:
    row = {
        "prompt": [says("user", "hi")],
        "chosen": [says("assistant", "yes")],
        "rejected": [says("assistant", "no")],
    }
    return row | changes


# Why it is refused, or None where it is kept, and what the detail has to name.
TEXT_CLASSES: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "kept": (TEXT, None, ""),
    "null": (TEXT | {"chosen": None}, "null_field", "chosen is null"),
    "empty chosen": (TEXT | {"chosen": ""}, "empty_chosen", "chosen"),
    "empty rejected": (TEXT | {"rejected": ""}, "empty_rejected", "rejected"),
    "white space only": (TEXT | {"chosen": " \n\t"}, "empty_chosen", "chosen"),
    "empty prompt": (TEXT | {"prompt": ""}, None, ""),
    "identical pair": (TEXT | {"chosen": "no"}, "identical_answers", "the same"),
    "identical after truncation": (
        TEXT | {"chosen": "q" * 99 + "a", "rejected": "q" * 99 + "b"},
        "identical_after_truncation",
        "the same tokens",
    ),
    "prompt over the limit": (TEXT | {"prompt": "q" * 99}, "prompt_too_long", "the limit is 32"),
    "long completion": (TEXT | {"chosen": "q" * 99}, None, ""),
    "special token in the text": (
        TEXT | {"chosen": "a<|eos|>b"},
        "special_token_in_text",
        "chosen contains the special token <|eos|>; to encode it as one, set special_tokens",
    ),
    "ends with the end of sequence": (TEXT | {"chosen": "yes!<|eos|>"}, None, ""),
    "control and NUL characters": (TEXT | {"chosen": "a\x00\x07b"}, None, ""),
    "right to left and emoji": (TEXT | {"chosen": "\u05d0\u202e\U0001f600"}, None, ""),
    "extra columns": (TEXT | {"prompt": "q: ", "source": "web"}, None, ""),
    "exact duplicate": (TEXT, "duplicate", "repeats an earlier pair"),
    "prompt of the evaluation set": (TEXT | {"prompt": "e: "}, "overlap", "evaluation set"),
    "score that is not a number": (
        TEXT | {"score_chosen": float("inf"), "score_rejected": 1.0},
        "bad_score",
        "inf",
    ),
}
CHAT_CLASSES: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "kept": (chat(), None, ""),
    "no role": (chat(chosen=[says(None, "c")]), "bad_message", "chosen[0] has no role"),
    "no content": (chat(chosen=[says("assistant", None)]), "bad_message", "no content"),
    "unknown role": (chat(prompt=[says("narrator", "x")]), "bad_role", "'narrator'"),
    "unknown order": (
        chat(prompt=[says("user", "a"), says("system", "b")]),
        "bad_role",
        "message 2 has the role system",
    ),
    "not ending with the assistant": (
        chat(chosen=[says("user", "c")]),
        "not_an_answer",
        "of chosen has a role other than assistant",
    ),
    "border not stable": (
        chat(prompt=[says("user", "unstable")]),
        "unstable_border",
        "renders the prompt differently before an answer",
    ),
}
DIALOGUE_CLASSES: dict[str, tuple[dict[str, Any], str | None, str]] = {
    "kept": ({"chosen": DIALOGUE + " a", "rejected": DIALOGUE + " b"}, None, ""),
    "prompt not shared": (
        {"chosen": DIALOGUE + " a", "rejected": "\n\nHuman: ho\n\nAssistant: b"},
        "prompt_not_shared",
        "chosen and rejected differ",
    ),
}
# Only text can be so wrong: lines of JSON as bytes.
LINE_CLASSES: dict[str, tuple[bytes, str | None, str]] = {
    "malformed middle line": (b'{"prompt": "cut', "malformed_json", "not valid JSON"),
    "not an object": (b"[1, 2]", "not_an_object", "not a JSON object"),
    "not UTF-8": (b'{"prompt": "\xff"}', "not_utf8", "UTF-8"),
    "duplicate key": (b'{"prompt": "a", "prompt": "b"}', "duplicate_key", "duplicate key"),
    "bad surrogate": (
        b'{"prompt": "p", "chosen": "\\ud83d", "rejected": "r"}',
        "bad_surrogate",
        "chosen contains an unpaired surrogate",
    ),
    "blank line": (b"  ", None, ""),
    "CRLF": (json.dumps(TEXT | {"prompt": "crlf: "}).encode() + b"\r", None, ""),
    "missing column in a row": (
        b'{"prompt": "p", "chosen": "c", "rejcted": "r"}',
        "missing_field",
        "rejected is missing; the row has chosen, prompt, rejcted; did you mean rejcted?",
    ),
    "wrong type": (json.dumps(TEXT | {"chosen": 7}).encode(), "wrong_type", "chosen is a int"),
    "the prompt in both answers": (
        json.dumps(
            {"prompt": "Who is it? A:", "chosen": "Who is it? A: c", "rejected": "Who is it? A: r"}
        ).encode(),
        "prompt_repeated",
        "begin with the prompt",
    ),
    "a row of 12 MB": (
        json.dumps(TEXT | {"chosen": "word " * 2_400_000}).encode(),
        "row_too_large",
        "characters, more than",
    ),
    "torn last line": (b'{"prompt": "p", "chosen": "c", "rej', "torn_last_line", "cut off"),
}
# A template that, like some, renders a turn otherwise when it is not the last.
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ '?' if m.content == 'unstable' and not loop.last }}"
    "{{ m.content }}{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
SETTINGS = (
    "max_length=64",
    "max_prompt_length=32",
    "truncation=drop",
    "drop_duplicates=true",
    "drop_overlap=true",
    "max_bad_fraction=1",
    "eval_files=eval.jsonl",
    "chat_template=template.jinja",
)


def as_lines(rows: list[Any]) -> bytes:
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    return b"\n".join(lines)


@pytest.fixture(scope="module")
def prepared(ray_cluster, run_here, tmp_path_factory) -> Path:
    """A folder in which `jobs/prepare.py` has read all rows of all classes."""
    folder = tmp_path_factory.mktemp("prepared")
    classes = {file: [row for row, _, _ in part.values()] for file, part in ROW_CLASSES.items()}
    lines = [line for line, _, _ in LINE_CLASSES.values()]
    (folder / "lines.jsonl").write_bytes(b"\xef\xbb\xbf" + as_lines(lines))
    for name, rows in classes.items():
        # Of the same pairs in two formats the second would be the duplicates of the first.
        apart = [{**row, **_tagged(row)} for row in rows]
        (folder / f"{name}.jsonl").write_bytes(as_lines(apart) + b"\n")
        columns = {column for row in rows for column in row}
        whole = [dict.fromkeys(columns) | row for row in rows]
        pq.write_table(pa.Table.from_pylist(whole), folder / f"{name}.parquet")
    other_schema = pa.table({"prompt": [1], "chosen": ["c"], "rejected": ["r"]})
    pq.write_table(other_schema, folder / "i.parquet")
    (folder / "array.json").write_text(json.dumps([TEXT | {"prompt": "array: "}]))
    (folder / "eval.jsonl").write_bytes(
        as_lines([TEXT | {"prompt": "e: "}, TEXT | {"prompt": "json e: "}])
    )
    (folder / "template.jinja").write_text(TEMPLATE)
    files = [f"{name}.{kind}" for kind in ("jsonl", "parquet") for name in classes]
    done = run_here(
        folder,
        "jobs/prepare.py",
        f"train_files=[lines.jsonl,{','.join(files)},i.parquet,array.json]",
        *SETTINGS,
        "run_name=run",
    )
    assert done.returncode == 0, done.stderr
    (folder / "out").write_text(done.stdout)
    return folder


def _tagged(row: dict[str, Any]) -> dict[str, Any]:
    """The prompt of a row as the same row in JSON has it."""
    prompt = row.get("prompt")
    if isinstance(prompt, str) and prompt:
        return {"prompt": f"json {prompt}"}
    return {}


def quarantined(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    text = (folder / "runs" / "run" / "quarantine" / "train.jsonl").read_text(encoding="utf-8")
    entries = [json.loads(line) for line in text.splitlines()]
    found = {(Path(entry["file"]).name, entry["row"]): entry for entry in entries}
    assert len(found) == len(entries)
    return found


def look(folder: Path, file: str, row: int, reason: str | None, detail: str) -> None:
    entry = quarantined(folder).get((file, row))
    if reason is None:
        assert entry is None
    else:
        assert entry is not None, f"{file}:{row} was kept"
        assert (entry["reason"], detail in entry["detail"]) == (reason, True), entry


ROW_CLASSES = {"text": TEXT_CLASSES, "chat": CHAT_CLASSES, "dialogue": DIALOGUE_CLASSES}
# Kept in JSON, where they come first: the same pairs in Parquet repeat them.
REPEATED = {("text", "empty prompt"), ("chat", "kept"), ("dialogue", "kept")}


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("file", "name"), [(file, name) for file, part in ROW_CLASSES.items() for name in part]
)
def test_rows(prepared: Path, file: str, name: str, kind: str) -> None:
    _, reason, detail = ROW_CLASSES[file][name]
    if kind == "parquet" and (file, name) in REPEATED:
        reason, detail = "duplicate", "repeats an earlier pair"
    look(prepared, f"{file}.{kind}", list(ROW_CLASSES[file]).index(name) + 1, reason, detail)


@pytest.mark.parametrize("name", LINE_CLASSES)
def test_lines(prepared: Path, name: str) -> None:
    _, reason, detail = LINE_CLASSES[name]
    look(prepared, "lines.jsonl", list(LINE_CLASSES).index(name) + 1, reason, detail)


def test_a_json_array_and_a_file_with_another_schema_are_read(prepared: Path) -> None:
    look(prepared, "array.json", 1, None, "")
    look(prepared, "i.parquet", 1, "wrong_type", "prompt is a int")


def test_the_report_adds_up_by_source_and_lists_what_was_ignored(prepared: Path) -> None:
    report = json.loads((prepared / "runs" / "run" / "data_report.json").read_text())["train"]
    listed = Counter(Path(file).name for file, _ in quarantined(prepared))
    for path, part in report["sources"].items():
        assert part["rows_read"] == part["rows_kept"] + part["rows_refused"]
        assert part["rows_refused"] == listed[Path(path).name]
    assert report["rows_refused"] == listed.total()
    assert report["ignored_columns"] == ["source"]
    assert len(report["shapes"]) == 3
    assert report["duplicate_pairs"] == report["refused"]["duplicate"] == 5
    out = (prepared / "out").read_text()
    assert "columns ignored: source" in out
    assert "first pair, " in out
    assert re.search(r"  prompt, \d+ tokens, in the NLL: '<\|bos\|>crlf:'\n", out)
    assert re.search(r"  rejected, \d+ tokens, in the odds ratio: ' no<\|eos\|>'\n", out)
    assert re.search(r"padded batches would take \d+, \d\.\d times as many", out)
    page = (prepared / "runs" / "run" / "data_report.html").read_text()
    assert page.count("<svg") == 2
    for reason in report["refused"]:
        assert f"<td>{reason}</td>" in page


def test_files_that_cannot_be_are_said_all_at_once(tmp_path, run_here) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "notes.txt").write_text("text")
    done = run_here(tmp_path, "jobs/train.py", "train_files=[empty.jsonl,none-*.jsonl,notes.txt]")
    assert done.returncode == 2
    empty, none, notes = done.stderr.splitlines()
    assert empty == f"error: train_files: {tmp_path}/empty.jsonl: is empty"
    assert none == "error: train_files: none-*.jsonl: no such file or folder"
    assert notes.startswith(f"error: train_files: {tmp_path}/notes.txt: not a supported file type")


@pytest.mark.commands
def test_files_that_cannot_be_read_are_said_all_at_once(tmp_path, run_here, ray_cluster) -> None:
    (tmp_path / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"a": 1}\n' * 99)[:-9])
    (tmp_path / "bad.jsonl.gz").write_bytes(b"not gzip at all")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more of it")
    done = run_here(
        tmp_path,
        "jobs/prepare.py",
        "train_files=[torn.jsonl.gz,bad.jsonl.gz,bad.parquet]",
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert [
        f"{tmp_path}/{name}:" in line
        for name, line in zip(("bad.jsonl.gz", "bad.parquet", "torn.jsonl.gz"), errors, strict=True)
    ] == [True] * 3
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.commands
def test_a_column_that_no_row_has_stops_with_what_is_there(tmp_path, run_here, ray_cluster) -> None:
    rows = [{"prompt": "p", "choosen": f"c{i}", "rejected": "r"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_bytes(as_lines(rows) + b"\n")
    done = run_here(tmp_path, "jobs/train.py", "train_files=pairs.jsonl")
    assert done.returncode == 2
    first, second, *_ = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert first.endswith("pairs.jsonl: 20 missing_field")
    assert second.endswith(
        "pairs.jsonl:1: missing_field: chosen is missing; the row has choosen, prompt, rejected; "
        "did you mean choosen? column_mapping={chosen: choosen}"
    )


BAD_LINES = [
    b'{"prompt": "cut',
    b"[1]",
    json.dumps(TEXT | {"chosen": ""}).encode(),
    json.dumps(TEXT | {"rejected": "yes"}).encode(),
    json.dumps({"prompt": "p", "chosen": "c"}).encode(),
]


@pytest.fixture(scope="module")
def ten_thousand(tmp_path_factory) -> tuple[Path, list[int]]:
    """A file of 10,000 rows, 100 of which are bad in five ways, and the lines of those."""
    folder = tmp_path_factory.mktemp("ten-thousand")
    bad = list(range(37, 10_000, 100))
    lines = [
        json.dumps({"prompt": f"{i} ", "chosen": "yes", "rejected": "no"}).encode()
        for i in range(10_000)
    ]
    for index, line in enumerate(bad):
        lines[line] = BAD_LINES[index % len(BAD_LINES)]
    (folder / "pairs.jsonl").write_bytes(as_lines(lines) + b"\n")
    return folder, [line + 1 for line in bad]


@pytest.mark.slow
def test_ten_thousand_rows_with_a_hundred_bad_ones(
    ten_thousand: tuple[Path, list[int]], run_command, ray_cluster
) -> None:
    """9,900 are trained, once each; exactly the bad ones are listed, with file and line."""
    folder, bad = ten_thousand
    done = run_command(
        folder,
        "jobs/train.py",
        "train_files=pairs.jsonl",
        "num_train_epochs=1",
        "per_device_train_batch_size=100",
        "max_length=32",
        "run_name=run",
        ray_address=ray_cluster,
    )
    assert done.returncode == 0, done.stderr
    kept = "10000 rows read, 9900 kept (9900 trained, 0 not reached)"
    assert f"train data: {kept}, 0 held out, 100 refused (" in done.stdout
    ledger = (folder / "runs" / "run" / "ledger.jsonl").read_text().splitlines()
    trained = Counter(tuple(row) for line in ledger for row in json.loads(line)["rows"])
    assert trained == Counter((0, row) for row in range(1, 10_001) if row not in set(bad))
    assert sorted(quarantined(folder)) == [("pairs.jsonl", line) for line in bad]
    report = json.loads((folder / "runs" / "run" / "data_report.json").read_text())["train"]
    assert (report["rows_trained"], report["rows_refused"]) == (9900, 100)
    (source,) = report["sources"].values()
    assert (source["rows_trained"], source["rows_not_reached"]) == (9900, 0)


@pytest.mark.slow
@pytest.mark.commands
def test_more_bad_rows_than_allowed_stop_before_any_worker(
    ten_thousand: tuple[Path, list[int]], run_here, ray_cluster
) -> None:
    folder, _ = ten_thousand
    done = run_here(
        folder,
        "jobs/train.py",
        "train_files=pairs.jsonl",
        "max_length=32",
        "max_bad_fraction=0.009",
        "run_name=stopped",
    )
    assert done.returncode == 2
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "train data: 100 of 10000 rows are refused (" in errors[0]
    assert "more than max_bad_fraction=0.009" in errors[0]
    assert "pairs.jsonl:38: malformed_json: the line is not valid JSON" in errors[1]
    assert "starting" not in done.stdout


@pytest.mark.slow
def test_real_data_in_a_mixture_adds_up(shared_data, tmp_path, run_command, ray_cluster) -> None:
    """hh-rlhf and both ShareGPT files, 20 steps on two workers; one with half its weight."""
    (tmp_path / "template.jinja").write_text(TEMPLATE)
    sources = {"hh": "hh_rlhf_harmless.jsonl", "en": "dpo_en_sharegpt.json"}
    sources["zh"] = "dpo_zh_sharegpt.json"
    entries = [f"{{path: {shared_data / file}, name: {name}}}" for name, file in sources.items()]
    entries[0] = entries[0].replace("}", ", weight: 0.5}")
    done = run_command(
        tmp_path,
        "jobs/train.py",
        f"train_files=[{', '.join(entries)}]",
        "val_set_size=0.1",
        "max_length=64",
        "chat_template=template.jinja",
        "num_workers=2",
        "max_steps=20",
        "run_name=run",
        ray_address=ray_cluster,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "runs" / "run" / "data_report.json").read_text())
    train = report["train"]
    parts = {part["name"]: part for part in train["sources"].values()}
    assert {name: part["rows_read"] for name, part in parts.items()} == {
        "hh": 1000,
        "en": 150,
        "zh": 100,
    }
    for part in (train, *parts.values()):
        ends = ("trained", "not_reached", "held_out", "refused")
        assert part["rows_read"] == sum(part[f"rows_{end}"] for end in ends)
    assert train["rows_trained"] == 20 * 32
    assert report["eval"]["rows_kept"] == train["rows_held_out"] > 60
    assert "held-out accuracy: " in done.stdout
    kept = AutoTokenizer.from_pretrained(tmp_path / "runs" / "run" / "final")
    assert kept.chat_template == TEMPLATE
