"""Data tasks get the driver's tokenizer: the same tokens, and no import of torch."""

import json
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from orpo_ray.dataset.ingest import ingest
from orpo_ray.dataset.request import IngestRequest
from orpo_ray.dataset.tokenize import TokenizeSplit
from tests.conftest import ROOT
from tests.reference.ingest import (
    chat_row,
    file_bytes,
    map_tasks,
    request_of,
    text_row,
    write_rows,
    write_tokenizer,
)

TEMPLATE = "{% for m in messages %}{{ m.role + ': ' + m.content }}{{ eos_token }}{% endfor %}"
TASK = """
import json, pickle, sys
work, items = pickle.load(open(sys.argv[1], "rb"))
answers = [json.loads(a["item"]) for item in items for a in work({"item": json.dumps(item)})]
print(json.dumps({"answers": answers, "torch": "torch" in sys.modules}))
"""


@pytest.fixture(params=[text_row, chat_row], ids=["texts", "messages"])
def request_for_rows(request: pytest.FixtureRequest, tmp_path: Path) -> IngestRequest:
    rows = [request.param(i) for i in range(40)]
    rows[7] |= {"chosen": "<|eos|>" * 2} if request.param is text_row else {"chosen": []}
    file = write_rows(tmp_path / "rows.jsonl", rows)
    return request_of((file,), write_tokenizer(tmp_path / "model"), tmp_path)


@pytest.mark.long
def test_another_process_writes_the_same_without_torch(request_for_rows, tmp_path):
    """Shards, counts and refused rows; with a template that the tokenizer's files do not have."""

    def elsewhere(items, work):
        (tmp_path / "task").write_bytes(pickle.dumps((work, items)))
        command = [sys.executable, "-c", TASK, str(tmp_path / "task")]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        answer = json.loads(done.stdout)
        assert not answer["torch"]
        return answer["answers"]

    def here(items, work):
        has_one = isinstance(work, TokenizeSplit)
        return map_tasks(items, replace(work, tokenizer=None) if has_one else work)

    asked = replace(request_for_rows, chat_template=TEMPLATE)
    tokens = [
        ingest(replace(asked, cache_directory=str(tmp_path / name)), tasks)
        for name, tasks in (("here", here), ("elsewhere", elsewhere))
    ]
    assert tokens[0].report["rows_kept"] == 39
    assert tokens[0].report == tokens[1].report
    one, other = (file_bytes(str(found.folder.path)) for found in tokens)
    del one["manifest.json"], other["manifest.json"]  # they name their folders
    assert one == other


class OwnTokenizer(PreTrainedTokenizerFast):
    """As custom code of a model's repository defines one."""


def test_a_class_of_custom_code_stays_where_it_is(request_for_rows, monkeypatch):
    """Other nodes may not have its module: there the tokenizer is loaded by its name."""
    loaded = request_for_rows.pair_tokenizer().tokenizer
    own = OwnTokenizer(tokenizer_object=loaded.backend_tokenizer, eos_token=loaded.eos_token)
    monkeypatch.setattr("orpo_ray.dataset.request.load_tokenizer", lambda _: own)
    (Path(request_for_rows.tokenizer) / "changed").touch()
    assert request_for_rows.pair_tokenizer().tokenizer is own
    assert request_for_rows.pickled_tokenizer() is None


def test_one_that_cannot_be_read_is_loaded_by_its_name(request_for_rows):
    """As where a node has another version of transformers."""
    found = request_for_rows.pair_tokenizer(b"\x80\x04cnowhere\nTokenizer\n.").tokenizer
    wanted = request_for_rows.pair_tokenizer().tokenizer
    assert found.backend_tokenizer.to_str() == wanted.backend_tokenizer.to_str()
