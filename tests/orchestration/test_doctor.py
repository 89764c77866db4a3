"""The page of `orpo-ray doctor`, and its exit codes."""

import json

import pytest

from orpo_ray.demo.model import make_demo_model
from orpo_ray.version import __version__


@pytest.fixture
def folder(tmp_path, monkeypatch):
    rows = [{"prompt": f"{i}: ", "chosen": f"yes {i}", "rejected": "no"} for i in range(100)]
    rows[2]["chosen"] = ""
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    make_demo_model(str(tmp_path / "model"), ["yes no"], 1)
    monkeypatch.setenv("HF_TOKEN", "hf_" + "abcdefghij" * 3)
    monkeypatch.setenv("TMPDIR", "/tmp/hf_" + "abcdefghij" * 3)
    return tmp_path


def test_the_page_has_machine_cluster_model_and_data(folder, run_here, ray_cluster):
    settings = ("train_files=pairs.jsonl", "model_name_or_path=model", "output_dir=out")
    done = run_here(folder, "jobs/doctor.py", *settings)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert f"orpo_ray: {__version__}" in lines
    names = [line.partition(":")[0] for line in lines]
    assert {"torch", "ray", "open files", "/dev/shm", "memory", "ports", "Ray"} <= set(names)
    assert f"output_dir: {folder}/out can be written" in lines
    assert not (folder / "out").exists()
    assert any(line.startswith("memory a worker: about ") for line in lines)
    (data,) = (line for line in lines if line.startswith("train data: "))
    assert (
        data == "train data: of the first 64 rows 63 are kept as texts (prompt, chosen, rejected)"
    )
    assert f"  {folder}/pairs.jsonl:3: empty_chosen: " in done.stdout
    assert "abcdefghij" not in done.stdout


def test_what_is_wrong_with_a_config_is_exit_2_below_the_page(folder, run_here, ray_cluster):
    done = run_here(folder, "jobs/doctor.py", "train_files=gone.jsonl", "model_name_or_path=model")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "gone.jsonl" in done.stderr
    assert f"orpo_ray: {__version__}" in done.stdout
    done = run_here(folder, "jobs/doctor.py", "bta=1")
    assert (done.returncode, done.stderr) == (
        2,
        "error: bta: no such setting; did you mean orpo.beta?\n",
    )


def test_what_is_wrong_with_the_machine_is_exit_1(folder, run_here, ray_cluster):
    (folder / "file").touch()
    done = run_here(folder, "jobs/doctor.py", "train_files=pairs.jsonl", "output_dir=file/runs")
    assert done.returncode == 1
    assert f"error: output_dir: {folder}/file/runs cannot be written: " in done.stderr
