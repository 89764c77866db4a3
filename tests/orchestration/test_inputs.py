"""From what a user names or holds in memory to files."""

import json
from pathlib import Path
from typing import Any

import datasets
import pandas as pd
import pyarrow.parquet as pq
import pytest
import ray.data

from orpo_ray.config.data import DataSource
from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.demo.model import make_demo_model
from orpo_ray.orchestration.inputs import find_inputs, keep_dataset
from orpo_ray.preference.errors import DataError

ROWS = [{"prompt": f"p{i}", "chosen": "yes", "rejected": "no"} for i in range(50)]


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a base model's folder and three files of pairs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    return tmp_path


def config(**settings: Any) -> ORPOConfig:
    return ORPOConfig(model_name_or_path="./model", **settings)


def test_a_mixture_has_weights_and_names(files: Path) -> None:
    entries = ["a.jsonl", {"path": "[bc].jsonl", "weight": 0.5, "name": "rest"}]
    inputs = find_inputs(config(train_files=entries), files / "runs")
    assert inputs.train_files == (
        DataSource(path=str(files / "a.jsonl")),
        DataSource(path=str(files / "b.jsonl"), weight=0.5, name="rest"),
        DataSource(path=str(files / "c.jsonl"), weight=0.5, name="rest"),
    )


def test_every_name_is_an_evaluation_set_of_its_own(files: Path) -> None:
    evals = ["a.jsonl", {"path": "b.jsonl", "name": "x"}, {"path": "c.jsonl", "name": "x"}]
    inputs = find_inputs(config(train_files="a.jsonl", eval_files=evals), files / "runs")
    names = {
        prefix: [Path(source.path).name for source in sources]
        for prefix, sources in inputs.eval_files.items()
    }
    assert names == {"eval_": ["a.jsonl"], "eval_x_": ["b.jsonl", "c.jsonl"]}


def test_what_is_passed_over_is_kept_for_every_data_set(
    files: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A file may be in two evaluation sets; a folder of another split than expected is said."""
    (files / "dev").mkdir()
    for name in ("dev.jsonl", "_d.jsonl", "d.txt"):
        (files / "dev" / name).write_text((files / "a.jsonl").read_text())
    evals = ["dev", {"path": "dev/*.jsonl", "name": "x"}]
    inputs = find_inputs(config(train_files=["a.jsonl", "dev"], eval_files=evals), files / "runs")
    assert inputs.passed_over == {
        "train": {"hidden": (1, ("_d.jsonl",)), "of other types": (1, ("d.txt",))},
        "eval_": {"hidden": (1, ("_d.jsonl",)), "of other types": (1, ("d.txt",))},
        "eval_x_": {"hidden": (1, ("_d.jsonl",))},
    }
    assert list(inputs.eval_files) == ["eval_", "eval_x_"]
    assert caplog.messages == ["train_files: all files of dev are of the split validation"]


def test_a_file_under_two_weights_is_refused(files: Path) -> None:
    entries = ["*.jsonl", {"path": "b.jsonl", "weight": 2}]
    with pytest.raises(DataError) as caught:
        find_inputs(config(train_files=entries), files / "runs")
    assert caught.value.lines == (
        f"train_files: {files}/b.jsonl: named twice, with another weight or name",
    )
    assert len(find_inputs(config(train_files=["*.jsonl", "b.jsonl"]), files).train_files) == 3


def test_weights_do_not_go_with_prompt_groups() -> None:
    with pytest.raises(ConfigError, match="takes no weights"):
        config(train_files=[{"path": "a", "weight": 2}], group_by_prompt=True)
    with pytest.raises(ConfigError, match="greater than 0"):
        config(train_files=[{"path": "a", "weight": 0}])


def test_a_chat_template_goes_with_the_model(files: Path) -> None:
    (files / "t.jinja").write_text("{{ messages }}")
    inputs = find_inputs(config(train_files="a.jsonl", chat_template="t.jinja"), files)
    assert inputs.model.chat_template == "{{ messages }}"
    with pytest.raises(DataError, match="chat_template: gone: no such file"):
        find_inputs(config(train_files="a.jsonl", chat_template="gone"), files)


def test_a_data_set_of_the_hub_is_kept_with_its_splits(files: Path) -> None:
    """A folder on this machine, which `datasets` loads by the same call as an id of the hub."""
    for split in ("train", "test"):
        (files / "hub" / "data").mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row) for row in ROWS[: 40 if split == "train" else 10]]
        (files / "hub" / "data" / f"{split}.jsonl").write_text("\n".join(lines))
    named = config(
        dataset_name="./hub", dataset_train_split="train[:50%]", dataset_test_split="test"
    )
    inputs = find_inputs(named, files / "runs")
    (train,), (test,) = inputs.train_files, inputs.eval_files["eval_"]
    assert pq.read_table(train.path).to_pylist() == ROWS[:20]
    assert pq.read_table(test.path).to_pylist() == ROWS[:10]
    with pytest.raises(DataError, match=r"dataset_name: \./hub: .*none"):
        find_inputs(named.replace(dataset_train_split="none"), files / "runs")


@pytest.mark.parametrize("kind", ["dict", "dataset", "pandas", "ray"])
def test_data_in_memory_is_kept_in_its_order(kind: str, tmp_path: Path, ray_cluster: str) -> None:
    columns = {name: [row[name] for row in ROWS] for name in ROWS[0]}
    made: Any = {
        "dict": lambda: columns,
        "dataset": lambda: datasets.Dataset.from_list(ROWS),
        "pandas": lambda: pd.DataFrame(ROWS),
        "ray": lambda: ray.data.from_items(ROWS, override_num_blocks=7),
    }[kind]()
    path = keep_dataset(made, tmp_path)
    assert pq.read_table(path).to_pylist() == ROWS
    assert keep_dataset(made, tmp_path) == path


def test_a_block_of_nothing_but_null_does_not_set_the_type(
    tmp_path: Path, ray_cluster: str
) -> None:
    rows = [ROWS[i] | {"note": None if i < 25 else "x"} for i in range(50)]
    path = keep_dataset(ray.data.from_items(rows, override_num_blocks=2), tmp_path)
    assert pq.read_table(path).to_pylist() == rows


def test_anything_else_in_memory_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="train_dataset: a set cannot be read"):
        keep_dataset({1}, tmp_path)


def test_adapters_are_a_model_for_evaluation_only(files: Path) -> None:
    base = str(files / "base")  # an id would be asked of the hub
    make_demo_model(base, ["some text"], 0)
    settings = json.dumps({"base_model_name_or_path": base, "peft_type": "LORA"})
    (files / "adapters").mkdir()
    (files / "adapters" / "adapter_config.json").write_text(settings)
    named = ORPOConfig(model_name_or_path="adapters", train_files="a.jsonl", eval_files="b.jsonl")
    assert find_inputs(named, files / "runs", only_evals=True).model.model == str(
        files / "adapters"
    )
    with pytest.raises(DataError) as caught:
        find_inputs(named, files / "runs")
    (line,) = caught.value.lines
    assert line.startswith("model_name_or_path: adapters holds LoRA adapters")
    assert base in line
