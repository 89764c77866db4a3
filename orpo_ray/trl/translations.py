"""From TRL's names and values to settings: a function for each name whose value changes."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from orpo_ray.config.schema import SECTION_OF
from orpo_ray.storage.hiding import hide
from orpo_ray.trl.names import Name, names

Settings = dict[str, Any]
Given = Mapping[str, Any]
_TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
_IN_8_BITS = ("adamw_8bit", "adamw_torch_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")
_KERNELS = {"sdpa": "sdpa", "flex_attention": "flex", "flash_attention_2": "auto"}
# Values of refused names that ask for what happens anyway.
_ACCEPTED: Mapping[str, tuple[Any, ...]] = {
    "is_encoder_decoder": (False,),
    "torch_compile_backend": ("inductor",),
    "torch_compile_mode": ("default",),
    "hub_token": ("<HUB_TOKEN>",),
    "push_to_hub_token": ("<PUSH_TO_HUB_TOKEN>",),
    "debug": ([],),
    "fsdp": ([], False),
}


@dataclass
class Translation:
    """What becomes of settings under TRL's names.

    Args:
        settings: by the names that they have here.
        kept: by TRL's names, what scripts read back.
        notes: lines about what became of a value.
        warnings: lines about values that have no effect, or become another thing.
        findings: lines about values that are refused.
    """

    settings: Settings = field(default_factory=dict)
    kept: Settings = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)


def translate(given: Given) -> Translation:
    """Settings as a user of TRL gives them, by the names that they have here.

    Settings of this project stay as they are. None stands for a name that was not given, as
    parsers of arguments have it, unless it is TRL's default or a setting's own value.
    """
    found, rows = Translation(), names()
    values = {name: _plain(value) for name, value in given.items()}
    own = [name for name in values if name not in rows or rows[name].verdict == "same"]
    found.settings |= {name: values[name] for name in own if name not in _TRANSLATED}
    for name, row in rows.items():  # the table's order: a strategy after its steps
        if name in values and name not in found.settings:
            _add(found, row, values[name], values)
    return found


def _add(found: Translation, row: Name, value: Any, given: Given) -> None:
    """Add what becomes of one of TRL's names."""
    is_setting, is_default = row.name in SECTION_OF, _same(value, row.default)
    if value is None and not is_setting and not is_default:
        return
    try:
        made = _made(row, value, given)
    except ValueError as error:
        shown = "" if "token" in row.name else f" (got {value!r})"
        found.findings.append(hide(f"{row.name}: not taken; {error}{shown}"))
        return
    found.settings |= made
    if not is_setting and not is_default and row.verdict != "refused":
        found.kept[row.name] = value
    if is_default or row.verdict in ("same", "refused") or made == {row.name: value}:
        return
    what = hide(f"{row.name}={value!r}")
    if row.verdict == "no_effect":
        found.warnings.append(f"{what} has no effect: {row.remark}")
        return
    became = ", ".join(f"{name}={new!r}" for name, new in made.items())
    if not became:
        became = f"{row.becomes}: {row.remark}" if row.remark else row.becomes
    is_exact = row.name != "optim" or str(value).startswith("adamw_torch")
    (found.notes if is_exact else found.warnings).append(hide(f"{what} becomes {became}"))


def _made(row: Name, value: Any, given: Given) -> Settings:
    """The settings that a value becomes.

    Raises:
        ValueError: for one that is refused, saying what to set instead.
    """
    if row.name in _TRANSLATED:
        return _TRANSLATED[row.name](value, given)
    if row.verdict == "refused":
        if _same(value, row.default) or value in _ACCEPTED.get(row.name, ()):
            return {}
        raise ValueError(row.remark)
    leaf = row.becomes.rpartition(".")[2]
    return {leaf: value} if row.verdict == "maps" and leaf in SECTION_OF else {}


def _same(value: Any, other: Any) -> bool:
    """Whether two values are equal, and both or neither a bool."""
    return isinstance(value, bool) == isinstance(other, bool) and bool(value == other)


def _plain(value: Any) -> Any:
    """Values of TRL's enums, and paths, as texts."""
    if isinstance(value, Enum):
        return value.value
    return str(value) if isinstance(value, Path) else value


def _unless_none(name: str) -> Callable[[Any, Given], Settings]:
    """A setting that has no None, where TRL has one for its default."""
    return lambda value, given: {} if value is None else {name: value}


def _run_name(value: Any, given: Given) -> Settings:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", value or "").lstrip(".-_")[:128]
    return {"run_name": name or None}


def _warmup(value: Any, given: Given) -> Settings:
    is_share = isinstance(value, float) and 0 < value < 1
    return {"warmup_ratio": value} if is_share else {"warmup_steps": value}


def _report_to(value: Any, given: Given) -> Settings:
    listed = [value] if isinstance(value, str) else list(value or ())
    if listed == ["all"]:
        return {"report_to": [name for name in _TRACKERS if find_spec(name)]}
    return {"report_to": [] if listed == ["none"] else listed}


def _every(value: Any) -> str | None:
    """What `no` and `epoch` of a strategy are as steps."""
    if value not in ("no", "epoch"):
        raise ValueError("it is no, steps or epoch")
    return "epoch" if value == "epoch" else None


def _eval_strategy(value: Any, given: Given) -> Settings:
    if value == "steps":
        return {"eval_steps": given.get("eval_steps") or given.get("logging_steps") or 10}
    return {"eval_steps": _every(value)}


def _save_strategy(value: Any, given: Given) -> Settings:
    if value == "best":
        return {"save_steps": None, "load_best_model_at_end": True}
    return {} if value == "steps" else {"save_steps": _every(value)}


def _logging_strategy(value: Any, given: Given) -> Settings:
    return {} if value == "steps" else {"logging_steps": _every(value)}


def _optim(value: Any, given: Given) -> Settings:
    if value == "adafactor" or value in _IN_8_BITS:
        return {"optim": "adafactor" if value == "adafactor" else "adamw_8bit"}
    if "adamw" not in str(value):
        raise ValueError(
            "the optimizer is AdamW in float32 or 8 bits, or Adafactor; lora_r trains in little "
            "memory"
        )
    return {"optim": "adamw"}


def _sampling(value: Any, given: Given) -> Settings:
    if value not in ("random", "sequential", "group_by_length"):
        raise ValueError("it is random, sequential or group_by_length")
    return {"shuffle": value != "sequential"}


def _safetensors(value: Any, given: Given) -> Settings:
    if not value:
        raise ValueError(names()["save_safetensors"].remark)
    return {}


def _model_arguments(value: Any, given: Given) -> Settings:
    """`model_init_kwargs`, of which others than these are refused unless they say nothing."""
    made: Settings = {}
    for name, part in (value or {}).items():
        text = str(part).removeprefix("torch.")
        if name == "revision":
            made["model_revision"] = part
        elif name == "attn_implementation" and part in _KERNELS:
            made["attention_kernel"] = _KERNELS[part]
        elif name in ("dtype", "torch_dtype") and text in ("bfloat16", "float32"):
            made["bf16"] = text == "bfloat16"
        elif name == "trust_remote_code":
            made["trust_remote_code"] = part
        elif part is not None and name != "use_cache" and (name, text) != ("dtype", "auto"):
            raise ValueError(f"{name}={part!r} has no setting here")
    return made


_TRANSLATED: Mapping[str, Callable[[Any, Given], Settings]] = {
    **{name: _unless_none(name) for name in ("output_dir", "metric_for_best_model")},
    "run_name": _run_name,
    "warmup_steps": _warmup,
    "report_to": _report_to,
    "max_grad_norm": lambda value, given: {"max_grad_norm": 0.0 if value is None else value},
    "eval_strategy": _eval_strategy,
    "evaluation_strategy": _eval_strategy,
    "save_strategy": _save_strategy,
    "logging_strategy": _logging_strategy,
    "optim": _optim,
    "adafactor": lambda value, given: {"optim": "adafactor"} if value else {},
    "train_sampling_strategy": _sampling,
    "save_safetensors": _safetensors,
    "model_init_kwargs": _model_arguments,
    "activation_checkpointing": lambda value, given: {"gradient_checkpointing": bool(value)},
    "auto_find_batch_size": lambda value, given: (
        {"max_tokens_per_microbatch": "auto"} if value else {}
    ),
    "ddp_timeout": lambda value, given: {"process_group_timeout_s": min(value, 1_000_000)},
    "use_cpu": lambda value, given: {"use_gpu": False} if value else {},
    "no_cuda": lambda value, given: {"use_gpu": False} if value else {},
}
