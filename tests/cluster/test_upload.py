"""What `ray job submit --working-dir .` uploads: what a job needs, and little more."""

import zipfile
from pathlib import Path

from ray._private.runtime_env.packaging import create_package

from tests.conftest import ROOT

KEPT_KIB = 2048


def uploaded(root: Path, work: Path) -> dict[str, int]:
    """The files that Ray packs of a folder, with their sizes, by Ray's own packing."""
    package = work / "package.zip"
    create_package(str(root), package, include_gitignore=True)
    with zipfile.ZipFile(package) as packed:
        infos = [info for info in packed.infolist() if not info.is_dir()]
    return {info.filename: info.file_size for info in infos}


def test_a_job_has_its_code_and_no_more(tmp_path):
    files = uploaded(ROOT, tmp_path)
    assert {"jobs/train.py", "jobs/tune.py", "orpo_ray/__init__.py", "orpo_ray/demo/demo.yaml"} <= {
        *files
    }
    assert {name.split("/")[0] for name in files if "/" in name} == {"jobs", "orpo_ray"}
    assert sum(files.values()) < KEPT_KIB * 1024


def test_all_of_the_package_is_taken(tmp_path):
    """With the files beside its code, which a wheel has, too."""
    kinds = ("*.py", "*.j2", "*.csv", "*.yaml", "py.typed")
    paths = [path for kind in kinds for path in (ROOT / "orpo_ray").rglob(kind)]
    code = {str(path.relative_to(ROOT)) for path in paths}
    assert code <= uploaded(ROOT, tmp_path).keys()


def test_what_lies_beside_the_code_stays_here(tmp_path):
    """Neither keys nor environments, data nor runs, whatever they are called."""
    ours = ["jobs/train.py", "orpo_ray/cli.py", "orpo_ray/reports/templates/run.html.j2", "my.yaml"]
    theirs = [
        *(".env", ".env.local", "id_rsa", "key.pem", "secrets.json", "credentials", "notes.txt"),
        *("venv/lib/x.py", "env/x.py", ".venv/x.py", "data/pairs.jsonl", "pairs.parquet"),
        *("runs/a/config.yaml", "out/final/model.safetensors", "mlruns/0/meta.yaml", "my/x.py"),
        *("jobs/.env", "jobs/data/a.jsonl", "orpo_ray/.env", "orpo_ray/demo/key.pem"),
        *("orpo_ray/runs/a.jsonl", "jobs/__pycache__/train.pyc", "orpo_ray/__pycache__/x.py"),
        *(".aws/credentials", ".huggingface/token", "docs/x.md", "tests/test_x.py"),
    ]
    folder = tmp_path / "work"
    for name in (*ours, *theirs):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("x")
    for name in (".rayignore", ".gitignore"):
        (folder / name).write_text((ROOT / name).read_text())
    assert uploaded(folder, tmp_path).keys() == set(ours)
