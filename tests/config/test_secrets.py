"""Secrets: no config takes one, and nothing that says so shows it."""

import pytest
from pydantic import ValidationError

from orpo_ray.config.data import DataSource
from orpo_ray.config.file import load_config
from orpo_ray.config.schema import SECTION_OF, SECTIONS, ConfigError, ORPOConfig
from orpo_ray.config.secrets import HIDDEN, hide, is_secret_name

CANARY = "canary0value1to2find"
NAMES = [
    "api_key",
    "hf_token",
    "HF_TOKEN",
    "token",
    "password",
    "secret",
    "wandbApiKey",
    "db-password",
    "credentials",
    "auth_token",
    "aws_secret_access_key",
    "AWS_ACCESS_KEY_ID",
    "client_secret",
]
HARMLESS = [
    "s3://bucket/a.jsonl",
    "https://host:8000/x@y.jsonl",
    "org/hf_model",
    "sk-learn-baseline-run",
    "runs/AKIRA",
    "0123456789abcdef0123456789abcdef",
    "hf://datasets/org/name@main/x.parquet",
]
# Put together here, so that no scanner takes this file for a leak.
VALUES = [
    "hf" + "_" + "aB3" * 12,
    "sk" + "-" + "aB3" * 10,
    "sk" + "-proj-" + "aB3" * 10,
    "AKIA" + "A1B2" * 4,
    "ghp" + "_" + "aB3" * 12,
    f"https://me:{CANARY}@host/pairs.jsonl",
    f"s3://{CANARY}:{CANARY}@bucket/*.parquet",
]


def refused(path: str | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return "\n".join(caught.value.lines)


@pytest.mark.parametrize("name", NAMES)
def test_names_of_secrets_are_known_wherever_they_stand(tmp_path, name):
    assert is_secret_name(name)
    for place in (name, f"model.{name}", f"search.{name}", f"hub.login.{name}"):
        text = refused(None, f"{place}={CANARY}", "beta=-1")
        assert text.startswith(f"{place}: looks like a secret by its name; ")
        assert "environment (HF_TOKEN" in text
        assert text.endswith("(got -1)")  # all at once
        assert CANARY not in text
    (tmp_path / "c.yaml").write_text(f"data:\n  - {{{name}: {CANARY}}}\n")
    assert CANARY not in refused(str(tmp_path / "c.yaml"))
    with pytest.raises(ValidationError, match="by its name") as caught:
        ORPOConfig(**{name: CANARY})
    assert CANARY not in f"{caught.value} {caught.value.errors()}"


def test_settings_are_not_taken_for_secrets():
    names = [*SECTION_OF, *SECTIONS, *DataSource.model_fields, "search", "eos_token", "pad_token"]
    assert not [name for name in names if is_secret_name(name)]
    config = ORPOConfig(
        max_tokens_per_microbatch=8, special_tokens_in_text="allow", max_new_tokens=3
    )
    assert config.train.max_new_tokens == 3


@pytest.mark.parametrize("value", VALUES)
def test_values_that_are_secrets_are_refused_unseen(tmp_path, value):
    settings = (f"run_name={value}", f"train_files=[a.jsonl,'{value}']", f"beta={value}", value)
    for setting in (*settings, f"search.beta=[{value}", f"sample_prompts=['{value}']"):
        text = refused(None, setting)
        assert value not in text, setting
        assert CANARY not in text
        assert "looks like a secret" in text
    (tmp_path / "c.yaml").write_text(f"eval_files: [{{path: '{value}'}}]\n")
    text = refused(str(tmp_path / "c.yaml"))
    assert text.startswith("eval_files.0.path: its value looks like a secret")
    with pytest.raises(ValidationError) as caught:
        ORPOConfig().replace(chat_template=value)
    assert value not in str(caught.value)
    assert hide(f"before {value} after") != f"before {value} after"


@pytest.mark.parametrize("value", HARMLESS)
def test_other_values_are_left_alone(value):
    config = load_config(None, [f"model_name_or_path={value}"])
    assert config.model.model_name_or_path == value
    assert hide(value) == value


def test_the_environments_secrets_are_not_interpolated(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", CANARY)
    monkeypatch.setenv("WHERE", "runs/there")
    monkeypatch.setenv("PWD", str(tmp_path))
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path))
    file = tmp_path / "c.yaml"
    for text in ("${oc.env:HF_TOKEN}", "x-${oc.env:HF_TOKEN,none}", "${oc.env: UNSET_API_KEY}"):
        file.write_text(f"output_dir: '{text}'\n")
        for lines in (refused(str(file)), refused(None, f"output_dir={text}")):
            assert "output_dir: reads the secret" in lines
            assert CANARY not in lines
    # By whatever way it came there.
    file.write_text("output_dir: '${oc.env:${run_name}}'\nrun_name: HF_TOKEN\n")
    for lines in (refused(str(file)), refused(None, f"output_dir=a/{CANARY}/b")):
        assert lines.startswith("output_dir: its value looks like a secret")
        assert CANARY not in lines
    assert load_config(None, [f"output_dir={tmp_path}"]).output.output_dir == str(tmp_path)
    assert load_config(None, ["output_dir=${oc.env:WHERE}"]).output.output_dir == "runs/there"
    assert hide(f"401 for {CANARY}") == f"401 for {HIDDEN}"
