"""A LoRA config of peft as settings, and models with adapters in memory; on the driver."""

import dataclasses
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from orpo_ray.config.schema import ConfigError
from orpo_ray.pretrained import ModelSource, load_model

_SETTINGS = {"r": "lora_r", "lora_alpha": "lora_alpha", "lora_dropout": "lora_dropout"}
# Fields that say nothing of the adapters, or what is so anyway.
_ANY_VALUE = {
    *("target_modules", "task_type", "peft_type", "auto_mapping", "base_model_name_or_path"),
    *("revision", "inference_mode", "fan_in_fan_out", "runtime_config", "peft_version"),
}


def lora_settings(peft_config: Any, model_type: str | None) -> dict[str, Any]:
    """The settings of a `peft.LoraConfig`.

    Args:
        peft_config: of LoRA; fields that have no setting must have peft's default.
        model_type: of the base model, by which peft chooses modules where none are named.

    Raises:
        ConfigError: naming every field that has no setting.
    """
    kind = type(peft_config).__name__
    if kind != "LoraConfig":
        raise ConfigError([f"peft_config: a {kind} has no settings here; give a peft.LoraConfig"])
    default = type(peft_config)()
    problems = [
        f"peft_config: {field.name}={getattr(peft_config, field.name)!r} has no setting here"
        for field in dataclasses.fields(peft_config)
        if field.name not in (*_SETTINGS, *_ANY_VALUE)
        and getattr(peft_config, field.name) != getattr(default, field.name)
    ]
    if (task := peft_config.task_type) is not None and getattr(task, "value", task) != "CAUSAL_LM":
        problems.append(f"peft_config: task_type={task!r} is not CAUSAL_LM")
    targets = peft_config.target_modules or _default_targets(model_type)
    if targets is None:
        problems.append("peft_config: name target_modules, or give 'all-linear'")
    elif isinstance(targets, str) and targets != "all-linear":
        problems.append(f"peft_config: target_modules={targets!r} is a pattern; list the names")
    if problems:
        raise ConfigError(problems)
    found = {name: getattr(peft_config, field) for field, name in _SETTINGS.items()}
    return found | {"lora_target_modules": None if targets == "all-linear" else sorted(targets)}


def _default_targets(model_type: str | None) -> Any:
    """The modules that peft adapts in a model of this type where none are named."""
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as MODULES

    return MODULES.get(model_type or "")


def adapter_config(model: Any) -> Any:
    """The LoRA config of a `PeftModel`, of which the adapters must be new; None of other models.

    Raises:
        ConfigError: for adapters that were trained, which would be lost.
    """
    configs = getattr(model, "peft_config", None)
    if not configs or not hasattr(model, "get_base_model"):
        return None
    trained = [n for n, p in model.named_parameters() if "lora_B" in n and bool(p.any())]
    if trained:
        raise ConfigError(
            ["model: its adapters were trained before, and would begin anew: merge them first"]
        )
    return configs[model.active_adapter]


def with_adapters(model: Any, peft_config: Any) -> Any:
    """A model in memory with new adapters, unless it has some, as users of TRL look at it.

    What is trained are the workers' own, which `with_trained_weights` puts here.
    """
    import peft

    return model if adapter_config(model) is not None else peft.get_peft_model(model, peft_config)


def refuse_encoder_decoder(model: Any) -> None:
    """Refuse a model that has an encoder.

    Raises:
        ConfigError: with its type.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            [f"model: an encoder-decoder ({config.model_type}); only decoders are trained"]
        )


def frozen_weights(model: Any) -> tuple[str, ...]:
    """Names of the modules and weights that the user froze (`requires_grad=False`), if any."""
    if not hasattr(model, "named_parameters") or adapter_config(model) is not None:
        return ()
    return tuple(_frozen_below(model, ""))


def _frozen_below(module: Any, name: str) -> list[str]:
    """The largest modules below one that are frozen as a whole, and weights of others."""
    weights = list(module.parameters())
    if not any(weight.requires_grad for weight in weights) and name:
        return [name] if weights else []
    before = f"{name}." if name else ""
    own = module.named_parameters(recurse=False)
    found = [f"{before}{part}" for part, weight in own if not weight.requires_grad]
    for part, child in module.named_children():
        found += _frozen_below(child, f"{before}{part}")
    return found


def base_weights(model: Any) -> tuple[PreTrainedModel, dict[str, Any] | None]:
    """The base model, and its own weights by their names without adapters; None: all it has."""
    if adapter_config(model) is None:
        return model, None
    base = model.get_base_model()
    weights = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in base.state_dict().items()
        if "lora_" not in name
    }
    return base, weights


def with_trained_weights(given: Any, folder: Path) -> Any:
    """Put trained weights into the model that was given; one without adapters gets them.

    Args:
        given: a model in memory, which keeps its device and type.
        folder: `final/` of the run.

    Returns:
        The same model, the `PeftModel` that now is around it, or what was in it.
    """
    if (folder / "adapter_config.json").exists():
        import peft

        if adapter_parts := getattr(given, "peft_config", None):
            name = next(iter(adapter_parts))
            weights = peft.load_peft_weights(str(folder), device="cpu")
            peft.set_peft_model_state_dict(given, weights, adapter_name=name)
            return given
        return peft.PeftModel.from_pretrained(given, str(folder))
    if hasattr(given, "get_base_model"):
        given = given.unload()  # the adapters were merged
    trained = load_model(ModelSource(str(folder), str(folder)), given.dtype)
    given.load_state_dict(trained.state_dict())
    return given
