"""The command line: exit codes, what is printed, and what is not imported."""

import json
import re
import signal
import subprocess
import sys

import pytest

from orpo_ray import StoppedError, __version__
from orpo_ray.cli import exit_code, main, read_arguments
from orpo_ray.config.schema import SECTION_OF, ORPOConfig
from orpo_ray.orchestration.stopping import (
    SignalInterrupt,
    command_signals,
    kept_handlers,
    requests,
)
from orpo_ray.training.errors import TrainingError
from tests.conftest import ROOT

TRAIN = "jobs/train.py"
COMMANDS = ("train", "tune", "evaluate", "prepare", "status", "doctor")


def imported_by(job: str, *arguments: str) -> tuple[int, set[str]]:
    """Exit code of a command line, and the top-level modules it imported."""
    script = (
        "import runpy, sys\n"
        f"sys.argv = {[str(ROOT / job), *arguments]!r}\n"
        "code = 0\n"
        "try:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    code = end.code or 0\n"
        "print('MODULES', code, *sorted({name.split('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    code, *modules = done.stdout.rsplit("MODULES ", 1)[1].split()
    return int(code), set(modules)


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--help"], 0), (["--print-schema"], 0), (["bta=1", "beta=-1"], 2)]
)
def test_nothing_heavy_is_imported_before_it_is_needed(arguments, code):
    got, modules = imported_by(TRAIN, *arguments)
    assert got == code
    assert not modules & {"torch", "ray", "transformers", "pyarrow", "datasets"}


def test_missing_files_are_refused_before_torch_is_imported(tmp_path):
    """It is imported while Ray starts."""
    files, model = f"train_files={tmp_path}/none", f"model_name_or_path={tmp_path}"
    got, modules = imported_by(TRAIN, files, model, f"output_dir={tmp_path}/runs")
    assert got == 2
    assert "ray" in modules
    assert not modules & {"torch", "transformers", "accelerate", "matplotlib"}


def test_what_the_controller_hands_on_imports_no_more_for_it():
    script = "import sys, orpo_ray.orchestration.answer; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert not set(done.stdout.split()) & {"ray", "torch", "orpo_ray.orchestration.workers"}


def test_help_names_every_command(capsys):
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("usage: ")
    assert all(f"\n  {name} " in shown for name in COMMANDS)


def test_the_version_is_printed(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"orpo-ray {__version__}\n"


LIST = "the commands are train, tune, evaluate, prepare, status, convert, doctor"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ([], f"no command given; {LIST}"),
        (["trian"], "trian: no such command; did you mean train?"),
        (["max_steps=2"], f"max_steps=2: no such command; {LIST}"),
        (
            ["status"],
            "the following arguments are required: RUN_DIR; "
            "`orpo-ray status --help` shows the arguments",
        ),
        (
            ["train", "--dryrun"],
            "unrecognized arguments: --dryrun; `orpo-ray train --help` shows the arguments",
        ),
    ],
)
def test_misuse_is_one_line_and_exit_2(arguments, error, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/orpo-ray"])
    try:
        code = main(arguments)
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert capsys.readouterr() == ("", f"error: {error}\n")


@pytest.mark.parametrize("name", COMMANDS)
def test_a_job_is_the_command_of_its_name_from_any_folder(name, run_command, tmp_path):
    done = run_command(tmp_path, f"jobs/{name}.py", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"usage: python jobs/{name}.py ")


def test_a_command_names_itself_when_its_working_directory_is_gone(tmp_path, monkeypatch, capsys):
    """Its end says how to go on; by then somebody may have removed the folder it began in."""
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setattr(sys, "argv", ["jobs/status.py"])
    with pytest.raises(SystemExit):
        main(["status", "--help"])
    assert capsys.readouterr().out.startswith("usage: python jobs/status.py ")


def test_the_package_is_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "orpo_ray", "train", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith("usage: python -m orpo_ray train [CONFIG.yaml] [key=value ...]")


def test_a_stopped_run_is_exit_143_and_a_line_that_says_how_to_resume(capsys):
    def stop() -> None:
        raise StoppedError("stopped at step 7 of 20")

    assert exit_code(stop) == 143
    assert capsys.readouterr() == (
        "stopped at step 7 of 20; the same command with the same run_name goes on\n",
        "",
    )


@pytest.mark.parametrize(("number", "code"), [(2, 130), (15, 143), (1, 143)])
def test_an_interrupt_is_its_exit_code_and_a_line_that_says_how_to_resume(number, code, capsys):
    def interrupt() -> None:
        raise SignalInterrupt(number)

    what = "interrupted" if number == 2 else "terminated"
    assert exit_code(interrupt) == code
    assert capsys.readouterr() == (
        "",
        f"{what}; the same command with the same run_name goes on\n",
    )


def test_an_error_in_training_is_a_line_and_exit_1(capsys):
    def fail() -> None:
        raise TrainingError("step 7: the loss is not finite")

    assert exit_code(fail) == 1
    assert capsys.readouterr() == ("", "error: step 7: the loss is not finite\n")


def test_what_fails_after_a_signal_is_an_interrupt(capsys):
    """Such as workers whose Ray the signal ended as well."""

    def fail() -> None:
        with requests(lambda: True):
            signal.raise_signal(signal.SIGTERM)
            raise OSError("no Ray\nany more")

    with kept_handlers():  # a command whose process ends leaves its signals ignored
        with command_signals():
            assert exit_code(fail) == 143
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    assert capsys.readouterr().err == (
        "OSError: no Ray\nterminated; the same command with the same run_name goes on\n"
    )


def test_a_bad_config_is_two_lines_and_exit_2(run_command, tmp_path):
    done = run_command(tmp_path, TRAIN, "bta=1", "beta=-1")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.splitlines() == [
        "error: orpo.beta: input should be greater than or equal to 0 (got -1)",
        "error: bta: no such setting; did you mean orpo.beta?",
    ]


def test_missing_files_and_folders_are_exit_2_all_at_once(run_here, tmp_path):
    done = run_here(
        tmp_path, TRAIN, "train_files=gone.jsonl", "eval_files=no/*.jsonl", "model_name_or_path=./m"
    )
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "error: train_files: gone.jsonl: no such file or folder",
        "error: eval_files: no/*.jsonl: no such file or folder",
        "error: model_name_or_path: ./m: no such folder",
    ]


@pytest.mark.commands
def test_no_usable_row_is_exit_2_with_the_reasons(run_here, ray_cluster, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"prompt": "p", "chosen": "a", "rejected": "a"}\n{]\n')
    done = run_here(tmp_path, TRAIN, "train_files=bad.jsonl")
    assert done.returncode == 2
    lines = done.stderr.splitlines()
    path = tmp_path / "bad.jsonl"
    assert lines == [
        f"error: no usable row in {path}: 1 identical_answers, 1 malformed_json",
        f"error: {path}:1: identical_answers: chosen and rejected are the same",
        f"error: {path}:2: malformed_json: the line is not valid JSON",
    ]


def test_help_names_every_setting(run_here, tmp_path):
    done = run_here(tmp_path, TRAIN, "--help")
    assert done.returncode == 0
    assert all(f"  {leaf} = " in done.stdout for leaf in SECTION_OF)


def test_the_schema_is_json_with_every_setting(run_here, tmp_path):
    schema = json.loads(run_here(tmp_path, TRAIN, "--print-schema").stdout)
    parts = {name: part["properties"] for name, part in schema["$defs"].items()}
    assert parts.pop("DataSource").keys() == {"path", "weight", "name"}
    assert {leaf for part in parts.values() for leaf in part} == set(SECTION_OF)


def test_a_dry_run_says_batch_steps_and_memory(run_here, tmp_path):
    """100 pairs, 2 x 3 x 1 pairs a step: 17 steps an epoch, 2 epochs: 34.

    The model: embedding 50 x 8, tied to the head; a layer of 4 x 8 x 8 attention, 3 x 8 x 16 MLP
    and two norms; a last norm: 400 + 256 + 384 + 16 + 8 = 1,064 parameters.
    """
    from transformers import LlamaConfig

    row = {"prompt": "p", "chosen": "a", "rejected": "b"}
    (tmp_path / "pairs.jsonl").write_text(f"{json.dumps(row)}\n" * 100)
    LlamaConfig(
        vocab_size=50,
        hidden_size=8,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    ).save_pretrained(tmp_path / "model")
    files = ("train_files=pairs.jsonl", "model_name_or_path=model")
    done = run_here(
        tmp_path,
        TRAIN,
        "--dry-run",
        *files,
        "per_device_train_batch_size=2",
        "gradient_accumulation_steps=3",
        "num_train_epochs=2",
    )
    assert done.returncode == 0, done.stderr
    assert "effective batch: 6 pairs a step" in done.stdout
    assert "steps: 34, from at most 100 pairs" in done.stdout
    assert "1,064 parameters" in done.stdout
    assert "activations of 2048 tokens" in done.stdout
    total, *parts = map(float, re.findall(r"\d+\.\d\d(?= )", done.stdout.partition("memory")[2]))
    assert total == pytest.approx(sum(parts), abs=0.03)
    fewer = run_here(tmp_path, TRAIN, "--dry-run", *files, "global_batch_size=1", "max_length=256")
    assert "effective batch: 1 pairs a step (global_batch_size)" in fewer.stdout
    assert "activations of 512 tokens" in fewer.stdout
    assert not (tmp_path / "runs").exists()


def test_the_demos_settings_are_for_the_demos_model_only():
    """Its learning rate is for a model that knows nothing yet."""
    assert read_arguments([]).train.learning_rate == 3e-3
    assert read_arguments(["train_files=a.jsonl"]).train.learning_rate == 3e-3
    assert read_arguments(["model_name_or_path=org/model"]) == ORPOConfig(
        model_name_or_path="org/model"
    )


def test_a_second_config_file_is_refused(run_here, tmp_path):
    done = run_here(tmp_path, TRAIN, "a.yaml", "b.yaml")
    assert done.returncode == 2
    assert done.stderr == "error: b.yaml: a second config file\n"
