"""What a command refuses before it starts, and what it leaves as it was."""

import json
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import tune as ray_tune

from orpo_ray import ORPOTrainer, evaluate, prepare, train, tune
from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.demo.model import make_demo_model
from orpo_ray.orchestration.start import with_run_name
from orpo_ray.orchestration.sweep.earlier import SWEEP, refuse_another_sweep, sweep_parts
from orpo_ray.preference.errors import DataError
from orpo_ray.runs.lock import claimed
from orpo_ray.runs.manifest import checkpoint, write_manifest
from orpo_ray.runs.resume import decisive_settings
from orpo_ray.storage.folder import Folder


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with pairs and a model; runs are below it."""
    folder = tmp_path_factory.mktemp("place")
    rows = [{"prompt": f"{i}: ", "chosen": f"yes {i}", "rejected": "no"} for i in range(20)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "bad.jsonl").write_text('{"prompt": "a", "chosen": "b"}\n' * 4)
    make_demo_model(str(folder / "model"), ["yes no"], 1)
    return folder


def config(place: Path, name: str, **changes: Any) -> ORPOConfig:
    files = {"train_files": str(place / "pairs.jsonl"), "eval_files": str(place / "pairs.jsonl")}
    model = {"model_name_or_path": str(place / "model"), "output_dir": str(place / "runs")}
    return ORPOConfig(**(files | model | {"run_name": name} | changes))


def begun(place: Path, name: str, **changes: Any) -> Folder:
    """A run that has a checkpoint of step 4, by its manifest, of 8 pairs a step on a worker."""
    run = Folder.at(place / "runs" / name).make()
    settings = decisive_settings(config(place, name, **changes), "digest")
    about = {"step": 4, "global_batch_pairs": 8, "pairs_per_worker": 8, "settings": settings}
    made = checkpoint(run, 4)
    made.path.mkdir(parents=True)
    write_manifest(made, about, {})
    for file, text in (("config.yaml", "torn: [\n"), ("data_report.json", "{}"), ("run.log", "")):
        run.write_text(file, text)
    return run


def contents(run: Folder) -> dict[str, bytes]:
    files = [path for path in run.path.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(run.path)): path.read_bytes() for path in files}


def refusal(command: Any, *arguments: Any) -> tuple[str, ...]:
    with pytest.raises((ConfigError, DataError)) as refused:
        command(*arguments)
    return refused.value.lines


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"per_device_train_batch_size": 2}, "counts 8 pairs a step, this config 2"),
        ({"beta": 0.3}, "beta: 0.1 in the checkpoint, 0.3 now"),
        (
            {"load_best_model_at_end": True, "metric_for_best_model": "accuracy", "eval_steps": 1},
            "metric_for_best_model: the evaluations have no eval_accuracy",
        ),
    ],
)
def test_a_refused_attempt_starts_nothing_and_changes_nothing(place, no_ray, change, told):
    name = "-".join(change)
    run = begun(place, name)
    before = contents(run)
    assert told in refusal(train, config(place, name, **change))[0]
    assert not ray.is_initialized()
    assert contents(run) == before


def test_no_command_writes_into_a_run_that_is_in_use(place, no_ray):
    run = Folder.at(place / "runs" / "busy")
    with claimed(run):
        for command in (train, tune, evaluate, prepare):
            assert "run_name: " in refusal(command, config(place, "busy"))[0]
        assert "is in use by" in refusal(lambda: ORPOTrainer(args=config(place, "busy")))[0]
    assert contents(run) == {}
    assert not ray.is_initialized()


def test_an_output_folder_that_cannot_be_made_is_one_line(place):
    (line,) = refusal(prepare, config(place, "r", output_dir=str(place / "pairs.jsonl" / "runs")))
    assert line.startswith(f"output_dir: {place}/pairs.jsonl/runs cannot be used: ")


def test_runs_of_one_second_have_names_of_their_own():
    assert len({with_run_name(ORPOConfig()).output.run_name for _ in range(8)}) == 8


def test_a_metric_that_no_evaluation_set_has_ends_a_sweep_at_once(place, no_ray):
    (line,) = refusal(tune, config(place, "sweep", metric="eval_tset_loss"))
    assert line.startswith("tune.metric: no evaluation set of this sweep has eval_tset_loss; ")
    assert line.endswith("known are eval_loss")
    (line,) = refusal(tune, config(place, "sweep", eval_files=None))
    assert line.startswith("eval_files: ")
    assert not ray.is_initialized()


def test_more_samples_are_a_further_part_of_a_sweep(place):
    space = {"beta": ray_tune.loguniform(0.05, 0.5), "seed": ray_tune.grid_search([1, 2])}
    folder = Folder.at(place / "runs" / "parts").make()
    for n_samples, parts in ((2, [("ray_tune", 2, 0)]), (2, [("ray_tune", 2, 0)])):
        asked = config(place, "parts", num_samples=n_samples)
        refuse_another_sweep(folder, asked, space, "digest")
        found = sweep_parts(folder, asked, space, "digest")
        assert [(part.state.name, part.n_samples, part.n_before) for part in found] == parts
    asked = config(place, "parts", num_samples=5)
    first, more = sweep_parts(folder, asked, space, "digest")
    assert (first.n_samples, more.n_samples, more.n_before) == (2, 3, 2)
    assert more.state.path == first.state.path / "part-2"


def test_another_search_is_refused_before_anything_starts(place, no_ray):
    first = config(place, "again", search={"beta": "loguniform(0.05, 0.5)"}, num_samples=3)
    space = {"beta": ray_tune.loguniform(0.05, 0.5)}
    run = Folder.at(place / "runs" / "again").make()
    sweep_parts(run, first, space, "digest")
    before = contents(run)
    search = {"beta": "choice(5.0, 6.0)", "learning_rate": "uniform(0.0, 0.1)"}
    other = config(place, "again", search=search, max_steps=7, num_samples=1)
    lines = refusal(tune, other)
    assert [line.partition(": ")[0] for line in lines[:-1]] == [
        *("search.beta", "search.learning_rate", "max_steps", "tune.num_samples"),
    ]
    assert lines[0] == (
        "search.beta: float loguniform(0.05, 0.5) in the earlier sweep, choice(5.0, 6.0) now"
    )
    assert lines[-1].startswith(f"{run}/{SWEEP} is of another sweep")
    with pytest.raises(ConfigError, match="train_data: the training pairs are not those"):
        refuse_another_sweep(run, first, space, "other")
    assert contents(run) == before
    assert not ray.is_initialized()


def test_reports_of_other_commands_and_of_refused_data_leave_those_of_a_run(place, ray_cluster):
    run = begun(place, "kept")
    before = contents(run)
    report = prepare(config(place, "kept", max_length=77))
    assert json.loads((run.path / "preparation" / "data_report.json").read_text()) == report
    assert (run.path / "preparation" / "data_report.html").exists()
    (run / "checkpoints").remove()
    bad = config(place, "kept", train_files=str(place / "bad.jsonl"))
    assert "no usable row" in refusal(train, bad)[0]
    refused = json.loads((run.path / "refused" / "data_report.json").read_text())
    assert refused["train"]["rows_refused"] == 4
    after = contents(run)
    kept = {name: text for name, text in before.items() if "/" not in name}
    assert {name: text for name, text in after.items() if "/" not in name} == kept


def test_a_model_in_memory_does_not_replace_that_of_an_earlier_attempt(place):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(place / "model")
    first = ORPOTrainer(model, config(place, "memory")).args.model.model_name_or_path
    again = ORPOTrainer(model, config(place, "memory")).args.model.model_name_or_path
    assert first == again == str(place / "runs" / "memory" / "inputs" / "model")
    model.lm_head.weight.data += 1
    before = contents(Folder.at(first))
    other = ORPOTrainer(model, config(place, "memory")).args.model.model_name_or_path
    assert other.startswith(f"{first}-")
    assert contents(Folder.at(first)) == before
