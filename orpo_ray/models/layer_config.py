"""Reading and changing a model config, whose layers may differ, as those of Gemma 4 do."""

from typing import Any


def setting(config: Any, name: str) -> Any:
    """A setting, the largest of the layers' where they differ; None where there is none."""
    try:
        return getattr(config, name, None)
    except RuntimeError:  # transformers' AmbiguousGlobalPerLayerAttributeError
        by_layer = [getattr(layer, name, None) for layer in config.per_layer_config]
        return max((value for value in by_layer if value is not None), default=None)


def head_width(config: Any) -> int:
    """The width of attention heads; 1 for models without attention."""
    width: int | None = setting(config, "head_dim")
    if width is None:
        hidden, n_heads = setting(config, "hidden_size"), setting(config, "num_attention_heads")
        width = hidden // n_heads if n_heads else 1
    wide: int = setting(config, "global_head_dim") or 0  # of some layers
    return max(width, wide)


def is_dropout(name: str) -> bool:
    """Whether a setting is a dropout probability."""
    return name.endswith(("dropout", "_pdrop", "dropout_prob", "dropout_rate"))


def without_dropout(config: Any) -> None:
    """Set every dropout probability of a config to 0."""
    for name, value in config.to_dict().items():
        if is_dropout(name) and isinstance(value, float):
            setattr(config, name, 0.0)
