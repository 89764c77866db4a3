"""The config: what it accepts, and how it says no."""

import itertools
import json
import pickle
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from orpo_ray.config.fields import Decides
from orpo_ray.config.file import FORMAT, load_config, to_yaml
from orpo_ray.config.schema import (
    SECTION_OF,
    SECTIONS,
    ConfigError,
    ORPOConfig,
    settings_that_decide,
)


def refusals(*overrides: str, path: str | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return list(caught.value.lines)


def test_leaf_names_are_unique_and_no_section_is_one():
    leaves = list(itertools.chain(*(model.model_fields for model in SECTIONS.values())))
    assert len(leaves) == len(set(leaves)) == len(SECTION_OF)
    assert not set(leaves) & set(SECTIONS)


def test_every_setting_says_what_it_decides_and_what_it_is():
    """In one of three words, and in sentences that stand by themselves."""
    decided = [settings_that_decide(what) for what in get_args(Decides)]
    assert sum(map(len, decided)) == len(SECTION_OF)
    assert frozenset().union(*decided) == SECTION_OF.keys()
    for section in SECTIONS.values():
        for name, field in section.model_fields.items():
            assert field.description is not None, name
            assert field.description[0].isupper(), name
            assert field.description.endswith("."), name


def test_settings_that_decide_the_tokens():
    """A trial with one of these of its own ingests for itself."""
    data = {
        *("train_files", "eval_files", "eval_subset_column", "val_set_size", "dataset_name"),
        *("dataset_config", "dataset_revision", "dataset_train_split", "dataset_test_split"),
        *("column_mapping", "min_score_gap", "chat_template", "max_length", "max_prompt_length"),
        *("max_completion_length", "truncation", "special_tokens_in_text", "drop_duplicates"),
        *("template_date", "template_drops"),
        *("drop_overlap", "group_by_prompt", "shard_rows"),
    }
    model = {"model_name_or_path", "model_revision", "trust_remote_code"}
    assert settings_that_decide("tokens") == data | model


def test_a_setting_may_stand_in_its_section_or_bare():
    bare = ORPOConfig(beta=0.3, num_workers=4)
    assert bare == ORPOConfig(orpo={"beta": 0.3}, ray={"num_workers": 4})
    assert bare == load_config(None, ["beta=0.3", "ray.num_workers=4"])


def test_the_last_setting_wins(tmp_path):
    (tmp_path / "run.yaml").write_text("beta: 0.5\ntrain:\n  seed: 3\n")
    config = load_config(str(tmp_path / "run.yaml"), ["beta=0.2", "orpo.beta=0.3"])
    assert (config.orpo.beta, config.train.seed) == (0.3, 3)


@pytest.mark.parametrize(
    ("text", "section", "leaf", "value"),
    [
        ("learning_rate: 1e-5", "train", "learning_rate", 1e-5),
        ("shuffle: no", "data", "shuffle", False),
        ("shuffle: off", "data", "shuffle", False),
        ("bf16: null", "train", "bf16", None),
        ("train_files: a.jsonl", "data", "train_files", ("a.jsonl",)),
        ("train_files: [a.jsonl, b.jsonl]", "data", "train_files", ("a.jsonl", "b.jsonl")),
        ("run_name: 7", "output", "run_name", "7"),
    ],
)
def test_yaml_means_the_same_in_a_file_and_an_override(tmp_path, text, section, leaf, value):
    (tmp_path / "run.yaml").write_text(text)
    from_file = load_config(str(tmp_path / "run.yaml"), [])
    override = load_config(None, [text.replace(": ", "=", 1)])
    assert getattr(getattr(from_file, section), leaf) == value
    assert from_file == override


def test_yaml_round_trip(tmp_path):
    config = ORPOConfig(beta=1e-5, train_files=["a", "b"], resources_per_worker={"CPU": 0.5})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "config.yaml"), []) == config


def test_a_config_cannot_be_changed():
    with pytest.raises(ValidationError, match="frozen"):
        ORPOConfig().orpo.beta = 0.2  # type: ignore[misc]


def test_replace_checks_what_it_puts_in():
    assert ORPOConfig().replace(beta=0.2).orpo.beta == 0.2
    with pytest.raises(ConfigError, match=r"orpo\.beta"):
        ORPOConfig().replace(beta=-1)


def test_every_setting_is_read_by_its_name_alone():
    config = ORPOConfig(beta=0.3, num_workers=[1, 4])
    for leaf, section in SECTION_OF.items():
        assert getattr(config, leaf) == getattr(getattr(config, section), leaf)
    with pytest.raises(AttributeError, match="betta"):
        _ = config.betta  # type: ignore[attr-defined]
    assert json.loads(config.to_json_string())["num_workers"] == [1, 4]
    assert ORPOConfig(**config.to_dict()) == pickle.loads(pickle.dumps(config)) == config


def test_python_says_of_a_wrong_setting_what_yaml_says():
    wrong = {"betta": 1, "lr": 1e-5, "max_length": 1, "train": {"seeed": 3}, "qqqq": 0}
    with pytest.raises(ConfigError) as caught:
        ORPOConfig(**wrong)
    lines = refusals("betta=1", "lr=1e-5", "max_length=1", "train.seeed=3", "qqqq=0")
    assert sorted(caught.value.lines) == sorted(lines)
    assert caught.value.__cause__ is caught.value.__context__ is None
    assert pickle.loads(pickle.dumps(caught.value)).lines == caught.value.lines
    with pytest.raises(ConfigError, match=r"did you mean orpo\.beta"):
        ORPOConfig().replace(betta=1)


@pytest.mark.parametrize("every", [0, -1, 1.5, "often", True, [3], "nan"])
def test_an_interval_is_of_steps_a_share_or_an_epoch(every):
    with pytest.raises(ConfigError) as caught:
        ORPOConfig(eval_steps=every)
    assert caught.value.lines == (
        "train.eval_steps: give a number of steps from 1, a share of all steps below 1, or epoch "
        f"(got {every!r})",
    )


def test_intervals_in_steps():
    """3.5 epochs of 7 steps are 25; a tenth of that is 2.5, rounded up as transformers does."""
    config = ORPOConfig(num_train_epochs=3.5, eval_steps="epoch", save_steps=0.1, logging_steps=4.0)
    train = config.with_intervals(7).train
    assert (train.eval_steps, train.save_steps, train.logging_steps) == (7, 3, 4)
    train = config.replace(save_steps=None, eval_steps="12").with_intervals(7).train
    assert (train.eval_steps, train.save_steps) == (12, None)


def test_all_findings_come_at_once():
    lines = refusals(
        "bta=1", "train.lr=3", "orpo=3", "beta=-1", "num_workers=x", "optimize.x=1", "max_steps=0"
    )
    assert lines[0] == "orpo: is a section; set orpo.<setting> (got 3)"
    assert sorted(lines[1:]) == [
        "bta: no such setting; did you mean orpo.beta?",
        "optimize: no such setting; did you mean train.optim?",
        "orpo.beta: input should be greater than or equal to 0 (got -1)",
        "ray.num_workers: give a number of workers from 1, or [min, max] of them (got 'x')",
        "train.lr: no such setting; did you mean train.learning_rate?",
        "train.max_steps: 0 steps: set a number from 1, or -1 for num_train_epochs (got 0)",
    ]


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("beta=.inf", "orpo.beta"),
        ("learning_rate=2", "less than or equal to 1"),
        ("num_workers=0", "give a number of workers from 1"),
        ("warmup_ratio=1.5", "less than or equal to 1"),
        ("lr_scheduler_type=lineer", "'linear', 'cosine'"),
        ("run_name=../else", "output.run_name"),
        ("shuffle=maybe", "valid boolean"),
        ("beta", "not a key=value setting"),
        ("beta=[1", "not valid YAML"),
        ("epochs=3", "did you mean train.num_train_epochs?"),
    ],
)
def test_what_is_wrong_with_a_value_is_said(override, part):
    (line,) = refusals(override)
    assert part in line
    assert "\n" not in line


def test_two_sources_of_pairs_are_refused():
    (line,) = refusals("train_files=a.jsonl", "dataset_name=org/pairs")
    assert line == "data: train_files and dataset_name are both set: keep one"


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("beta: 1\nbeta: 2\n", "duplicate key"),
        ("[1, 2]", "holds a list"),
        ("a: [", "not valid YAML"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
    ],
)
def test_a_bad_file_is_refused_by_name(tmp_path, content, part):
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    (line,) = refusals(path=str(path))
    assert line.startswith(str(path))
    assert part in line


def test_what_is_wrong_in_a_file_is_said_with_its_name(tmp_path):
    """An override that is wrong is the command's own, also where the file sets it too."""
    path = tmp_path / "run.yaml"
    path.write_text("train:\n  of_another_version: 1\n  max_steps: soon\nbeta: -1\n")
    lines = refusals("max_steps=later", "lr=1", path=str(path))
    in_file = [line.removeprefix(f"{path}: ") for line in lines if line.startswith(str(path))]
    assert sorted(line.partition(":")[0] for line in in_file) == [
        "orpo.beta",
        "train.of_another_version",
    ]
    others = [line.partition(":")[0] for line in lines if not line.startswith(str(path))]
    assert sorted(others) == ["lr", "train.max_steps"]


@pytest.mark.parametrize(
    "text", ["it costs ${5}", "a\\${b}", "a\\\\${b} ${c}\\", "${", "{{ x }} ${y", "$5 \\ ???"]
)
def test_a_text_with_a_dollar_reads_back_as_it_is(tmp_path, text):
    config = ORPOConfig(sample_prompts=(text,), search={"seed": [text]})
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "config.yaml"), []) == config


def test_a_file_of_another_version_is_read_without_what_it_alone_has(tmp_path, caplog):
    """What it has in common with this one is checked as ever, and so is a file of this version."""
    path = tmp_path / "config.yaml"
    text = to_yaml(ORPOConfig(beta=0.3)).replace("beta: 0.3", "beta: 0.3\n  future_smoothing: 0.1")
    text += "future:\n  setting: 1\n"
    path.write_text(text)
    lines = refusals(path=str(path))
    assert [line.partition(": no such setting")[0] for line in lines] == [
        f"{path}: orpo.future_smoothing",
        f"{path}: future",
    ]
    path.write_text(text.replace(f"format: {FORMAT}", f"format: {FORMAT + 1}"))
    assert load_config(str(path), []) == ORPOConfig(beta=0.3)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path}: 'future' is no setting of this version, and is left out",
        f"{path}: orpo: 'future_smoothing' is no setting of this version, and is left out",
    ]
    path.write_text(path.read_text().replace("beta: 0.3", "beta: -1"))
    assert refusals(path=str(path))[0].startswith(f"{path}: orpo.beta")
    assert refusals("format=2")[0].startswith("format: no such setting")


@pytest.mark.parametrize("text", ["a: " + "[" * 100_000, "- " * 100_000 + "a", "{a: " * 5000])
def test_yaml_that_is_nested_too_deeply_is_refused(tmp_path, text):
    """The parser in C would end the process."""
    (tmp_path / "config.yaml").write_text(text)
    assert "in one another" in refusals(path=str(tmp_path / "config.yaml"))[0]
    assert "in one another" in refusals(f"run_name={text[:90_000].removeprefix('a: ')}")[0]


def test_a_missing_file_is_refused_with_all_else():
    lines = refusals("beta=-1", path="gone.yaml")
    assert lines[0] == "gone.yaml: no such config file"
    assert len(lines) == 2


def test_pairs_of_a_step_and_tokens_of_a_microbatch():
    """4 pairs x 3 passes x 2 workers = 24, unless given; 4 pairs x 100 tokens = 400."""
    config = ORPOConfig(
        per_device_train_batch_size=4,
        gradient_accumulation_steps=3,
        num_workers=2,
        max_length=100,
    )
    assert config.pairs_per_step == 24
    assert config.replace(global_batch_size=8).pairs_per_step == 8
    assert config.microbatch_tokens == 400
    assert config.replace(max_tokens_per_microbatch=9).microbatch_tokens == 9


def test_the_best_of_no_evaluations_is_refused():
    for setting in ("load_best_model_at_end=true", "early_stopping_patience=2"):
        assert refusals(setting) == [
            f"train: {setting.split('=')[0]}: nothing is evaluated between the start and the end; "
            "set eval_steps"
        ]
        load_config(None, [setting, "eval_steps=5"])


def test_code_of_a_model_is_run_at_a_commit_only():
    commit = "0123456789abcdef" * 2 + "01234567"
    for other in ("main", commit[:-1], commit.upper(), ""):
        (line,) = refusals("trust_remote_code=true", f"model_revision='{other}'")
        assert line.startswith("model: trust_remote_code")
        assert "set model_revision to the full commit hash (40 hex digits)" in line
    config = load_config(None, ["trust_remote_code=true", f"model_revision={commit}"])
    assert (config.model.trust_remote_code, config.model.model_revision) == (True, commit)
    assert ORPOConfig().model.trust_remote_code is False


def test_yaml_that_runs_code_is_refused_and_not_run(tmp_path):
    trace = tmp_path / "trace"
    text = f"!!python/object/apply:os.system ['touch {trace}']"
    (tmp_path / "bad.yaml").write_text(f"run_name: {text}\n")
    assert "not valid YAML" in refusals(path=str(tmp_path / "bad.yaml"))[0]
    assert "not valid YAML" in refusals(f"run_name={text}")[0]
    assert not trace.exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".", "/tmp/x", "a\\b", "x\n", "~", ".x"])
def test_a_run_name_cannot_leave_the_output_directory(name):
    with pytest.raises(ConfigError, match=r"output\.run_name"):
        ORPOConfig(run_name=name)
    with pytest.raises(ConfigError, match="name"):
        ORPOConfig(eval_files=[{"path": "a.jsonl", "name": name}])


@settings(deadline=None, max_examples=60)
@given(
    st.text(alphabet="\\\\${}:a\"' ,.[]?\n#-", max_size=12)
    | st.text(max_size=10)
    | st.from_regex(r"[-+]?[0-9._]+([eE][-+]?[0-9_]+)?", fullmatch=True)
    | st.sampled_from(["yes", "null", "~", "2024-01-01", "???", "0x1F", "1:30", "${oc.env:HOME}"])
)
def test_a_config_reads_back_whatever_texts_it_holds(tmp_path_factory, text):
    try:
        config = ORPOConfig(sample_prompts=(text,), column_mapping={"prompt": text or "p"})
        content = to_yaml(config).encode()
    except (ConfigError, UnicodeEncodeError):
        return  # a text that no config holds, or no file
    path = tmp_path_factory.getbasetemp() / "texts.yaml"
    path.write_bytes(content)
    assert load_config(str(path), []) == config
