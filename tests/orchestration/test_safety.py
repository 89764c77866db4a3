"""What may not happen: code that nobody asked for, tokens that are shown, clusters open unsaid."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_ray.config.schema import ConfigError, ORPOConfig
from orpo_ray.demo.model import make_demo_model
from orpo_ray.orchestration.cluster.exposure import asks_for_token, reachable_addresses
from orpo_ray.orchestration.evaluate import evaluate
from orpo_ray.orchestration.inputs import find_inputs
from orpo_ray.preference.errors import DataError
from orpo_ray.pretrained import ModelSource, UnsupportedModelError, load_model, refuse_unsafe
from orpo_ray.training.estimate import plan_lines
from tests.conftest import ROOT

TRAIN = "jobs/train.py"
COMMIT = "0123456789abcdef" * 2 + "01234567"
CANARIES = {
    "HF_TOKEN": "hf" + "_" + "caNary1" * 5,
    "WANDB_API_KEY": "canary2" * 6,
    "AWS_SECRET_ACCESS_KEY": "caNary3" * 6,
    "MY_DATABASE_PASSWORD": "canary4 with a blank",
}
CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({trace!r}).touch()


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pairs, and a model with its tokenizer."""
    path = tmp_path_factory.mktemp("safety")
    pairs = [{"prompt": f"{i} + 1 =", "chosen": f" {i + 1}", "rejected": " no"} for i in range(60)]
    (path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    make_demo_model(str(path / "model"), [str(pair) for pair in pairs], 1)
    return path


@pytest.fixture
def own_code(folder, tmp_path) -> tuple[Path, Path]:
    """The model as one of its own code, and the file that appears when the code is run."""
    trace, path = tmp_path / "trace", tmp_path / "own"
    AutoModelForCausalLM.from_pretrained(folder / "model").save_pretrained(path)
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    names = {"AutoConfig": "modeling_x.OwnConfig", "AutoModelForCausalLM": "modeling_x.OwnModel"}
    config |= {"auto_map": names, "model_type": "own", "architectures": ["OwnModel"]}
    (path / "config.json").write_text(json.dumps(config))
    (path / "modeling_x.py").write_text(CODE.format(trace=str(trace)))
    return path, trace


@pytest.mark.long
def test_code_of_a_model_is_not_run(own_code, folder, run_command, run_here, monkeypatch, tmp_path):
    path, trace = own_code
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    says = f"{path} contains custom code, which is not run; review it, then set trust_remote_code"
    done = run_here(folder, TRAIN, "train_files=pairs.jsonl", f"model_name_or_path={path}")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: model_name_or_path: {says}")
    assert len(done.stderr.splitlines()) == 1
    with pytest.raises(DataError, match=r"baseline: .* contains custom code"):
        evaluate(ORPOConfig(baseline=str(path)))
    with pytest.raises(ConfigError, match=r"model_name_or_path: .* contains custom code"):
        plan_lines(ORPOConfig(model_name_or_path=str(path)))
    with pytest.raises(UnsupportedModelError, match="contains custom code"):
        load_model(ModelSource(str(path), str(path)), torch.float32)
    assert not trace.exists()
    trusted = ("trust_remote_code=true", f"model_revision={COMMIT}")
    done = run_command(folder, TRAIN, "--dry-run", f"model_name_or_path={path}", *trusted)
    assert done.returncode == 0, done.stderr
    assert trace.exists()


def test_code_of_a_tokenizer_is_not_run(own_code, folder):
    path, trace = own_code
    model = json.loads((folder / "model" / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(model))
    settings = json.loads((path / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": [None, "modeling_x.X"]}, "tokenizer_class": "X"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UnsupportedModelError, match="contains custom code"):
        refuse_unsafe(ModelSource(str(path), str(path)))
    assert not trace.exists()


def test_pickled_weights_are_not_read(folder, tmp_path):
    path = tmp_path / "pickled"
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    model.save_pretrained(path)
    (path / "model.safetensors").unlink()
    torch.save(model.state_dict(), path / "pytorch_model.bin")
    with pytest.raises(DataError) as caught:
        find_inputs(ORPOConfig(model_name_or_path=str(path)), tmp_path)
    (line,) = caught.value.lines
    assert line.startswith(f"model_name_or_path: {path} has no safetensors weights")
    assert "save_pretrained()" in line
    with pytest.raises(UnsupportedModelError, match="has no safetensors weights"):
        load_model(ModelSource(str(path), str(path)), torch.float32)


def hits(folders: list[Path], values: list[str]) -> list[tuple[str, str]]:
    """Every file that holds one of the values."""
    found = []
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        content = path.read_bytes()
        found += [(str(path), value) for value in values if value.encode() in content]
    return found


@pytest.mark.slow
def test_no_secret_is_shown(folder, run_command, ray_cluster, monkeypatch):
    """Canaries in the environment of the driver; its workers read them in that of the cluster."""
    import ray

    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text()
    values = [*CANARIES.values(), token]
    settings = ("train_files=pairs.jsonl", "eval_files=pairs.jsonl", "model_name_or_path=model")
    small = ("max_steps=2", "logging_steps=1", "run_name=run", "sample_prompts=1")
    resources = "resources_per_worker={CPU: 1}"
    done = run_command(folder, TRAIN, *settings, *small, resources, ray_address=ray_cluster)
    assert done.returncode == 0, done.stderr
    assert not [value for value in values if value in done.stdout + done.stderr]
    assert "asks for no token" not in done.stdout
    run = folder / "runs" / "run"
    assert (run / "report.html").exists()
    assert (run / "final" / "README.md").exists()
    session = Path(ray._private.worker.global_worker.node.get_session_dir_path())
    assert (session / "logs").is_dir()
    assert hits([run, folder / "runs", session / "logs"], values) == []
    for setting in (f"hf_token={CANARIES['HF_TOKEN']}", "run_name=${oc.env:WANDB_API_KEY}"):
        done = run_command(folder, TRAIN, *settings, setting)
        assert done.returncode == 2
        assert not [value for value in values if value in done.stdout + done.stderr]


def test_an_error_is_printed_without_secrets(tmp_path):
    script = (
        "import os, sys\nfrom orpo_ray.cli import exit_code\n"
        "def action():\n"
        "    raise OSError('401 for ' + os.environ['HF_TOKEN'])\n"
        "sys.exit(exit_code(action))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=os.environ | CANARIES,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "OSError: 401 for [hidden]"


def test_addresses_that_others_reach():
    assert reachable_addresses(["127.0.0.1", "::1", "localhost", "127.9.0.1"]) == []
    mixed = ["10.0.0.7", "127.0.0.1", "10.0.0.7", "head"]
    assert reachable_addresses(mixed) == ["10.0.0.7", "head"]


def test_a_cluster_with_tokens_is_known_as_one(ray_cluster):
    assert asks_for_token(ray_cluster)


JOINED = """
from orpo_ray.orchestration.cluster import connection, exposure

connection.connect()
print(exposure.exposure_warning())
"""


@pytest.mark.slow
def test_an_open_cluster_is_warned_of(tmp_path_factory):
    """A driver that has a token joins it just the same: only the cluster's answer tells."""
    home = tmp_path_factory.mktemp("r")
    options = ["--node-ip-address=127.0.0.1", "--port=26391", "--include-dashboard=false"]
    options += ["--num-cpus=1", f"--temp-dir={home}", "--ray-client-server-port=26392"]
    head = subprocess.Popen(
        [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", *options],
        env=os.environ | {"RAY_AUTH_MODE": "disabled"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        end = time.monotonic() + 60
        while asks_for_token("127.0.0.1:26391"):  # also while nothing answers there
            assert time.monotonic() < end
            time.sleep(0.5)
        done = subprocess.run(
            [sys.executable, "-c", JOINED],
            cwd=ROOT,
            env=os.environ | {"RAY_ADDRESS": "127.0.0.1:26391"},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    finally:
        head.send_signal(signal.SIGTERM)
        head.wait(30)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("this Ray cluster asks for no token")
