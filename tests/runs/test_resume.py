"""Which differences from a checkpoint make a run another one."""

import pytest

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.runs.resume import ResumeError, changed_settings, decisive_settings, refuse_changes

# What a manifest records, besides the digest of the pairs.
DECISIVE = {
    *("model_name_or_path", "model_revision", "trust_remote_code", "disable_dropout", "lora_r"),
    *("lora_alpha", "lora_dropout", "lora_target_modules", "load_in_4bit", "beta", "nll_scope"),
    *("router_aux_loss_coef", "learning_rate", "lr_scheduler_type", "warmup_ratio", "warmup_steps"),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16"),
    *("full_determinism", "seed", "shuffle", "shuffle_window_shards"),
}


def settings(**changes):
    return decisive_settings(ORPOConfig(**changes), "digest")


def test_a_manifest_records_what_decides_the_weights():
    assert settings().keys() == DECISIVE | {"train_data"}


@pytest.mark.parametrize(
    "change",
    [{"beta": 0.2}, {"learning_rate": 1e-3}, {"seed": 1}, {"shuffle": False}, {"lora_r": 4}],
)
def test_what_decides_the_weights_is_refused_by_name(change):
    ((name, value),) = change.items()
    (line,) = changed_settings(settings(), settings(**change))
    assert line.startswith(f"{name}: ")
    assert line.endswith(f"{str(value).lower() if isinstance(value, bool) else value} now")
    with pytest.raises(ResumeError, match="resume_changed=true"):
        refuse_changes({"settings": settings(), "step": 3}, settings(**change))


@pytest.mark.parametrize(
    "change",
    [
        {"max_steps": 9},
        {"num_train_epochs": 1.0},
        {"logging_steps": 1},
        {"save_steps": 1},
        {"baseline": "other"},
        {"train_files": "elsewhere.jsonl"},
        {"gradient_accumulation_steps": 2},
    ],
)
def test_how_long_how_often_and_how_the_work_is_cut_may_change(change):
    assert changed_settings(settings(), settings(**change)) == []


def test_a_setting_that_is_new_in_this_version_is_no_change():
    before = settings()
    del before["full_determinism"]
    assert changed_settings(before | {"gone": 1}, settings()) == []


def test_other_pairs_are_a_change():
    (line,) = changed_settings(settings(), settings() | {"train_data": "other"})
    assert line == "train_data: the training pairs are not those of the checkpoint"
