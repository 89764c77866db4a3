"""Which differences from a checkpoint make a run another one."""

from typing import Any

import pytest

from orpo_ray.config.schema import ORPOConfig
from orpo_ray.runs.resume import (
    ResumeError,
    changed_settings,
    decisive_settings,
    refuse_changes,
    with_batch_size,
)
from orpo_ray.storage.folder import Folder

# What a manifest records, besides the digest of the pairs.
DECISIVE = {
    *("model_name_or_path", "model_revision", "trust_remote_code", "disable_dropout", "lora_r"),
    *(
        "frozen_weights",
        "lora_alpha",
        "lora_dropout",
        "lora_target_modules",
        "load_in_4bit",
        "beta",
        "nll_scope",
    ),
    *(
        "router_aux_loss_coef",
        "learning_rate",
        "optim",
        "lr_scheduler_type",
        "lr_scheduler_kwargs",
        "data_seed",
        "warmup_ratio",
        "warmup_steps",
    ),
    *("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm", "bf16"),
    *("objective", "loss_type", "simpo_gamma", "cpo_alpha", "label_smoothing"),
    *("full_determinism", "seed", "shuffle", "shuffle_window_shards"),
}


def settings(**changes):
    return decisive_settings(ORPOConfig(**changes), "digest")


def test_a_manifest_records_what_decides_the_weights():
    assert settings().keys() == DECISIVE | {"train_data"}


def manifest(**changes: Any) -> dict[str, Any]:
    about = {"step": 3, "global_batch_pairs": 8, "pairs_per_worker": 8, "settings": settings()}
    return about | changes


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
        refuse_changes(Folder.at("runs/r"), manifest(), ORPOConfig(**change))


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


def test_every_difference_is_said_with_the_checkpoint_that_has_it(tmp_path):
    """`resume_changed` allows other settings and pairs, but not another number of pairs a step."""
    run, other = Folder.at(tmp_path), {"per_device_train_batch_size": 4, "beta": 0.2}
    with pytest.raises(ResumeError) as refused:
        refuse_changes(run, manifest(), ORPOConfig(**other), "other")
    counts, *changed, made = str(refused.value).splitlines()
    made_by = f"{tmp_path}/checkpoints/step-00000003"
    assert counts.startswith(f"{made_by} counts 8 pairs a step, this config 4; ")
    assert [line.partition(":")[0] for line in changed] == ["beta", "train_data"]
    assert made.startswith(f"{made_by} was made with other settings or pairs")
    with pytest.raises(ResumeError, match=r"^.* this config 4; .*$"):
        refuse_changes(run, manifest(), ORPOConfig(**other, resume_changed=True), "other")
    refuse_changes(run, manifest(), ORPOConfig(resume_changed=True, beta=0.2), "other")


def test_the_state_of_another_optimizer_is_refused_whatever_is_wanted(tmp_path):
    """Nor does a checkpoint of a version that had AdamW only fit another one."""
    found, run = manifest(), Folder.at(tmp_path)
    config = ORPOConfig(optim="adafactor", resume_changed=True)
    for _ in range(2):
        with pytest.raises(ResumeError, match="has the state of optim=adamw, not of adafactor"):
            refuse_changes(run, found, config)
        found["settings"].pop("optim", None)
    refuse_changes(run, found, ORPOConfig(resume_changed=True, seed=7))


@pytest.mark.parametrize(
    ("recorded", "change", "pairs"),
    [
        ({}, {"num_workers": 2}, 8),
        ({}, {"num_workers": 2, "gradient_accumulation_steps": 2}, 32),
        ({}, {"num_workers": 2, "global_batch_size": 16}, 16),
        ({"pairs_per_worker": 2}, {"num_workers": 2}, 16),
        ({"pairs_per_worker": 2}, {"per_device_train_batch_size": 2}, 8),
    ],
)
def test_only_another_number_of_workers_keeps_the_pairs_per_step(recorded, change, pairs):
    """The checkpoint counts 8 a step; 8 a worker are the default here."""
    found = manifest(**recorded)
    assert with_batch_size(ORPOConfig(**change), found).pairs_per_step == pairs


def test_without_a_record_of_the_workers_the_checkpoint_decides():
    found = manifest()
    del found["pairs_per_worker"]
    config = ORPOConfig(per_device_train_batch_size=2, num_workers=2)
    assert with_batch_size(config, found).pairs_per_step == 8
    assert with_batch_size(config, None).pairs_per_step == 4


def test_the_scope_of_the_nll_is_recorded_as_it_is():
    """A checkpoint of a version whose default was named resumes with none given."""
    assert settings()["nll_scope"] == settings(nll_scope="all")["nll_scope"] == "all"
    assert settings(objective="cpo")["nll_scope"] == "completion"
