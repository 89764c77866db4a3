"""The table of TRL's names, against TRL itself, and what `ORPOConfig` makes of each."""

import dataclasses
import logging
import pickle
from typing import Any

import pytest
from transformers import HfArgumentParser
from transformers.trainer_utils import IntervalStrategy

from orpo_ray import ConfigError, ORPOConfig
from orpo_ray.config.schema import SECTION_OF
from orpo_ray.trl.names import Name, names

# Other values than TRL's defaults, where one more, the contrary or a word is none.
EXAMPLES: dict[str, Any] = {
    "warmup_steps": 0.1,
    "run_name": "org/model: beta 0.1",
    "optim": "adamw_bnb_8bit",
    "eval_strategy": "epoch",
    "evaluation_strategy": "epoch",
    "save_strategy": "best",
    "logging_strategy": "epoch",
    "model_init_kwargs": {"attn_implementation": "sdpa", "dtype": "bfloat16"},
    "train_sampling_strategy": "sequential",
    "truncation_mode": "keep_start",
    "activation_checkpointing": True,
}


def other_value(row: Name) -> Any:
    if row.name in EXAMPLES:
        return EXAMPLES[row.name]
    if isinstance(row.default, bool):
        return not row.default
    return row.default + 1 if isinstance(row.default, int | float) else "word"


def rows(*verdicts: str) -> list[Any]:
    return [pytest.param(row, id=row.name) for row in names().values() if row.verdict in verdicts]


def test_the_table_has_every_name_of_trl_with_its_default():
    from trl.experimental.orpo import ORPOConfig as TheirConfig

    for field in dataclasses.fields(TheirConfig):
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory()
        assert field.name in names(), field.name
        shown = getattr(default, "value", default)
        assert names()[field.name].default == shown, field.name


def test_every_row_says_what_becomes_of_the_name():
    for row in names().values():
        place, _, leaf = row.becomes.rpartition(".")
        assert row.verdict in ("same", "maps", "no_effect", "refused"), row
        if row.verdict == "same":
            assert (leaf, place) == (row.name, SECTION_OF[row.name]), row
        if place:
            assert SECTION_OF[leaf] == place, row
        assert row.becomes if row.verdict in ("same", "maps") else row.remark and not row.becomes


@pytest.mark.parametrize("row", rows("same", "maps", "no_effect", "refused"))
def test_trls_default_is_accepted_without_a_word(row, caplog):
    caplog.set_level(logging.INFO, logger="orpo_ray")
    config = ORPOConfig(**{row.name: row.default})
    assert getattr(config, row.name) == row.default or row.name in SECTION_OF
    assert not caplog.messages


@pytest.mark.parametrize("row", rows("maps", "no_effect"))
def test_another_value_is_accepted_in_one_line(row, caplog):
    caplog.set_level(logging.INFO, logger="orpo_ray")
    value = other_value(row)
    config = ORPOConfig(**{row.name: value, "eval_steps": 5, "eval_files": "x.jsonl"})
    (line,) = caplog.messages
    assert line.startswith(f"{row.name}={value!r} ")
    if row.verdict == "no_effect":
        assert line.endswith(f"has no effect: {row.remark}")
        assert config == config.replace(**{row.name: value})
    if row.name not in SECTION_OF:
        assert getattr(config, row.name) == config.to_dict()[row.name] == value
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize("row", rows("refused"))
def test_another_value_is_refused_in_one_line(row):
    with pytest.raises(ConfigError) as caught:
        ORPOConfig(**{row.name: other_value(row)})
    (line,) = caught.value.lines
    assert line.startswith(f"{row.name}: not taken; {row.remark}")
    assert ("word" in line) == ("token" not in row.name and other_value(row) == "word")


@pytest.mark.parametrize(
    ("given", "settings"),
    [
        ({"eval_strategy": "no", "eval_steps": 7}, {"eval_steps": None}),
        ({"eval_strategy": "steps", "eval_steps": 7}, {"eval_steps": 7}),
        ({"eval_strategy": "steps", "logging_steps": 3}, {"eval_steps": 3, "logging_steps": 3}),
        ({"eval_strategy": IntervalStrategy.EPOCH}, {"eval_steps": "epoch"}),
        ({"save_strategy": "no", "save_steps": 5}, {"save_steps": None}),
        ({"save_strategy": "steps", "save_steps": 0.5}, {"save_steps": 0.5}),
        ({"logging_strategy": "epoch", "logging_steps": 5}, {"logging_steps": "epoch"}),
        ({"warmup_steps": 0.25}, {"warmup_ratio": 0.25, "warmup_steps": 0}),
        ({"warmup_steps": 4}, {"warmup_ratio": 0.0, "warmup_steps": 4}),
        ({"max_grad_norm": None}, {"max_grad_norm": 0.0}),
        ({"report_to": "none"}, {"report_to": ()}),
        ({"report_to": "tensorboard"}, {"report_to": ("tensorboard",)}),
        ({"metric_for_best_model": None}, {"metric_for_best_model": "eval_loss"}),
        ({"use_cpu": True}, {"use_gpu": False}),
        ({"auto_find_batch_size": True}, {"max_tokens_per_microbatch": "auto"}),
        ({"ddp_timeout": 1800}, {"process_group_timeout_s": 1800.0}),
        ({"model_init_kwargs": {"revision": "main", "dtype": "auto"}}, {"model_revision": "main"}),
        ({"run_name": "..a/b"}, {"run_name": "a-b"}),
        ({"optim": "adamw_torch_fused"}, {"optim": "adamw"}),
        ({"optim": "paged_adamw_32bit"}, {"optim": "adamw"}),
        ({"optim": "adamw_torch_8bit"}, {"optim": "adamw_8bit"}),
        ({"optim": "paged_adamw_8bit"}, {"optim": "adamw_8bit"}),
        ({"optim": "adafactor"}, {"optim": "adafactor"}),
        ({"adafactor": True}, {"optim": "adafactor"}),
    ],
)
def test_what_values_become(given, settings):
    config = ORPOConfig(**given)
    assert {name: getattr(config, name) for name in settings} == settings
    assert ORPOConfig(**config.to_dict()) == config
    assert ORPOConfig().replace(**given) == config


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"eval_strategy": "often"}, "eval_strategy: not taken; it is no, steps or epoch"),
        ({"optim": "lion_32bit"}, "optim: not taken; the optimizer is AdamW"),
        ({"model_init_kwargs": {"device_map": "auto"}}, "device_map='auto' has no setting here"),
        ({"model_init_kwargs": {"dtype": "float16"}}, "dtype='float16' has no setting here"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder: not taken; only decoders are trained"),
    ],
)
def test_values_that_are_refused(given, said):
    with pytest.raises(ConfigError) as caught:
        ORPOConfig(**given)
    assert said in caught.value.lines[0]


def test_the_first_positional_argument_is_the_output_directory(tmp_path):
    assert ORPOConfig("there").output_dir == "there"
    assert ORPOConfig(tmp_path, beta=0.3) == ORPOConfig(output_dir=str(tmp_path), beta=0.3)


def test_what_scripts_ask_of_their_process():
    args = ORPOConfig(num_workers=[1, 4], per_device_train_batch_size=2)
    assert (args.world_size, args.train_batch_size, args.eval_batch_size) == (4, 2, 16)
    assert (args.should_save, args.process_index, args.n_gpu) == (True, 0, 0)
    kinds = (bool, int, float, str)
    assert all(isinstance(value, kinds) for value in args.to_sanitized_dict().values())


def test_all_findings_come_at_once_and_no_token_is_shown():
    with pytest.raises(ConfigError) as caught:
        ORPOConfig(fsdp="full_shard", beta=-1, betta=1, hub_token="hf_secret")
    assert sorted(line.partition(":")[0] for line in caught.value.lines) == [
        *("betta", "fsdp", "hub_token", "orpo.beta")
    ]
    assert "hf_secret" not in str(caught.value)


def test_a_config_does_not_change_but_in_a_copy():
    args = ORPOConfig(eval_strategy="epoch")
    with pytest.raises(AttributeError, match=r"args = args.replace\(eval_strategy='no'\)"):
        args.eval_strategy = "no"
    assert args.replace(beta=0.5).eval_strategy == "epoch"
    assert dataclasses.replace(args, eval_strategy="no").eval_steps is None


def test_arguments_are_parsed_as_trls_are():
    from trl import ModelConfig, ScriptArguments, TrlParser

    (args,) = HfArgumentParser(ORPOConfig).parse_args_into_dataclasses([], look_for_args_file=False)
    assert args == ORPOConfig()
    line = (
        "--dataset_name d --model_name_or_path m --output_dir o --beta 0.3 --bf16 --eval_strategy"
    )
    line += " steps --eval_steps 5 --report_to none --num_workers [1,2] --no_disable_dropout"
    line += " --no_remove_unused_columns --logging_first_step --do_eval"
    script, args, model = TrlParser(
        (ScriptArguments, ORPOConfig, ModelConfig)
    ).parse_args_and_config(line.split())
    assert (script.dataset_name, model.model_name_or_path) == ("d", "m")
    wanted = {"output_dir": "o", "beta": 0.3, "bf16": True, "eval_strategy": "steps"}
    wanted |= {"eval_steps": 5, "report_to": (), "num_workers": (1, 2), "disable_dropout": False}
    wanted |= {"remove_unused_columns": False, "logging_first_step": True, "do_eval": True}
    assert args == ORPOConfig(**wanted)
