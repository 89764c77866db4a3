"""Settings of a config whose layers may differ, as those of Gemma 4 do; anywhere."""

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
