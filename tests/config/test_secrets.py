"""Secrets: no config takes one, and nothing that says so shows it."""

import pytest

from orpo_ray.config.data import DataSource
from orpo_ray.config.file import load_config
from orpo_ray.config.schema import SECTION_OF, SECTIONS, ConfigError, ORPOConfig
from orpo_ray.preference.errors import DataError
from orpo_ray.storage.hiding import HIDDEN, hide, is_secret_name, printable

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
    "DB_PASS",
    "AZURE_STORAGE_KEY",
    "SENTRY_DSN",
    "AZURE_STORAGE_CONNECTION_STRING",
    "SLACK_WEBHOOK_URL",
    "encryption_key",
]
HARMLESS = [
    "s3://bucket/a.jsonl",
    "https://host:8000/x@y.jsonl",
    "org/hf_model",
    "sk-learn-baseline-run",
    "runs/AKIRA",
    "0123456789abcdef0123456789abcdef",
    "hf://datasets/org/name@main/x.parquet",
    "runs/token=short",
    "s3://bucket/part-?.jsonl",
    "APACHELICENSE and ACCOUNTING",
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
    "xoxb-1234567890-" + "aB3" * 8,
    "AIza" + "aB3" * 11 + "aB",
    "glpat-" + "aB3" * 7,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0." + "aB3" * 14,
    "SG." + "aB3" * 7 + "a." + "aB3" * 14 + "a",
    "sk_live_" + "aB3" * 8,
    "https://h.example/p.jsonl?X-Goog-Signature=" + "0a" * 32,
    "https://h.example/c/p.jsonl?sv=2024&se=2027&sig=abc%2Bdef0123456789%3D",
    "Endpoint=sb://x.example;SharedAccessKey=" + "aB3/" * 10 + "=",
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
    with pytest.raises(ConfigError, match="by its name") as caught:
        ORPOConfig(**{name: CANARY})
    assert CANARY not in f"{caught.value} {caught.getrepr(chain=True)}"


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
    with pytest.raises(ConfigError) as caught:
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
    monkeypatch.setenv("ORPO_RAY_CONFIG_ENV", "WHERE, HF_TOKEN, UNSET_API_KEY")
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
    assert refused(str(file)).startswith("output_dir: `${` begins a reference")
    lines = refused(None, f"output_dir=a/{CANARY}/b")
    assert lines.startswith("output_dir: its value looks like a secret")
    assert CANARY not in lines
    assert load_config(None, [f"output_dir={tmp_path}"]).output.output_dir == str(tmp_path)
    assert load_config(None, ["output_dir=${oc.env:WHERE}"]).output.output_dir == "runs/there"
    assert hide(f"401 for {CANARY}") == f"401 for {HIDDEN}"


@pytest.mark.parametrize("name", ["AZURE_STORAGE_KEY", "DB_PASS", "HOME", "USER", "NOT_SET"])
def test_no_variable_is_read_that_the_user_did_not_list(tmp_path, monkeypatch, name):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("ORPO_RAY_CONFIG_ENV", "WHERE,HOMES,OTHER_HOME")
    (tmp_path / "c.yaml").write_text(f"output_dir: 'x/${{oc.env:{name}}}'\n")
    for lines in (
        refused(str(tmp_path / "c.yaml")),
        refused(None, f"output_dir=${{oc.env:{name}}}"),
    ):
        assert lines.startswith("output_dir: reads the ")
        assert "/home/someone" not in lines
        assert is_secret_name(name) or f"set ORPO_RAY_CONFIG_ENV={name}" in lines


@pytest.mark.parametrize(
    "text",
    [
        "${oc.decode:abc}",
        "${oc.create:{a: 1}}",
        "${oc.select:train.seed}",
        "${oc.dict.keys:train}",
        "${oc.env:${run_name}}",
        "${.seed}",
        "${oc.env}}${oc.decode:1}",
        "${5}",
        "${train.seed}${oc.env:HOME}",
    ],
)
def test_nothing_else_is_computed_in_a_config(tmp_path, text):
    (tmp_path / "c.yaml").write_text(f"train:\n  sample_prompts: ['{text}']\n")
    lines = refused(str(tmp_path / "c.yaml"))
    assert lines.startswith("train.sample_prompts.0: ")
    assert "\n" not in lines


def test_settings_may_refer_to_settings_but_not_in_a_circle(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("train: {seed: 7}\noutput: {run_name: 'run-${train.seed}'}\n")
    assert load_config(str(file), []).output.run_name == "run-7"
    file.write_text(
        "output: {run_name: '${output.output_dir}', output_dir: '${output.run_name}'}\n"
    )
    assert "not valid YAML" in refused(str(file))


def test_a_query_of_a_url_is_shown_nowhere():
    url = "https://host/p.jsonl?download=true&id=7"
    assert hide(f"{url}: 404, see s3://bucket/p-?.jsonl") == (
        f"https://host/p.jsonl?{HIDDEN}: 404, see s3://bucket/p-?.jsonl"
    )
    assert "is a URL with a query" in refused(None, f"train_files={url}")
    for error in (ConfigError([url]), DataError([url])):
        assert "download" not in f"{error} {error.lines}"
    assert load_config(None, [f"sample_prompts=['What is at {url}?']"]).train.sample_prompts


def test_control_characters_are_shown_as_escapes():
    assert printable("a\x1b[2Jb\r\x9b\u202ec\td\n") == "a\\x1b[2Jb\\r\\x9b\\u202ec\td\n"


@pytest.mark.parametrize("part", ["eyJ", "https://a?b=", "://a:", "sk-", "a=", "-----BEGIN "])
def test_a_long_text_takes_no_longer_than_its_length(part):
    """30,000 characters of what begins a secret, and a secret."""
    secret = "glpat-" + "aB3" * 7
    shown = hide(f"{part * (30_000 // len(part))} {secret} {secret}")
    assert secret not in shown


def test_a_secret_in_a_long_text_is_hidden_wherever_it_is():
    secret, key = "glpat-" + "aB3" * 7, "-----BEGIN PRIVATE KEY-----" + "aB3" * 2000
    for n_words in range(400, 420):
        assert hide("word four " * n_words + f'"{secret}"\n' + key) == (
            "word four " * n_words + '"[hidden]"\n[hidden]'
        )


@pytest.mark.parametrize(
    "secret",
    [
        "glpat-" + "aB3" * 7,
        "npm_" + "aB3" * 12,
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0." + "aB3" * 14,
        "sk_live_" + "aB3" * 8,
        "xoxb-1234567890-" + "aB3" * 8,
        "123456789:" + "aB3" * 11 + "aB",
    ],
)
def test_a_token_is_hidden_to_its_last_letter(secret):
    """Rules of detect-secrets give a part of what they match, such as the name before a token."""
    assert hide(f"failed with {secret} at x") == f"failed with {HIDDEN} at x"
