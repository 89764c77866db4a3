"""Loading a run's base model, config and tokenizer: safetensors only, custom code only on request.

Used on the driver, training workers and data tasks; imports transformers only when it loads.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_ray.config.model import ModelSection
from orpo_ray.storage.files import read_json
from orpo_ray.storage.folder import Folder, Names, everything, light
from orpo_ray.storage.names import is_plain


class UnsupportedModelError(ValueError):
    """A model whose loss this project would compute wrongly, or cannot compute at all."""


_INDEX = ".safetensors.index.json"
_PICKLED = (("model", "pytorch_model"), ("adapter_model", "adapter_model"))


@dataclass(frozen=True)
class ModelSource:
    """A base model and its tokenizer, and how to load them.

    Args:
        model: folder or hub id of the base model.
        tokenizer: folder or hub id of its tokenizer, usually the same.
        revision: branch, tag or commit on the hub, of both.
        chat_template: Jinja template that replaces the tokenizer's.
        trust_remote_code: whether custom code of the model may run.
    """

    model: str | Folder
    tokenizer: str | Folder
    revision: str | None = None
    chat_template: str | None = None
    trust_remote_code: bool = False

    @staticmethod
    def from_config(config: ModelSection, path: str | Folder) -> "ModelSource":
        """Build the source of a model and tokenizer in one place, with the config's options."""
        return ModelSource(
            path, path, config.model_revision, trust_remote_code=config.trust_remote_code
        )

    @property
    def options(self) -> dict[str, Any]:
        """Keyword arguments of every `from_pretrained` call.

        `trust_remote_code` is always passed: without it, transformers asks on the terminal. Custom
        code may be in another repository; `code_revision` pins that one to the same commit, too.
        """
        options = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        return options | ({"code_revision": self.revision} if self.trust_remote_code else {})


def load_tokenizer(source: ModelSource) -> Any:
    """Load the tokenizer, with the source's chat template if it has one.

    Raises:
        UnsupportedModelError: for custom code that is not trusted.
    """
    from transformers import AutoTokenizer

    with _as_refusals(source.tokenizer):
        folder = on_this_node(source.tokenizer, light)
        tokenizer = AutoTokenizer.from_pretrained(folder, **source.options)
    if source.chat_template is not None:
        tokenizer.chat_template = source.chat_template
    return tokenizer


def load_model_config(source: ModelSource) -> Any:
    """Load the base model's config.

    Raises:
        UnsupportedModelError: for custom code that is not trusted.
    """
    from transformers import AutoConfig

    with _as_refusals(source.model):
        return AutoConfig.from_pretrained(on_this_node(source.model, light), **source.options)


def load_model(source: ModelSource, dtype: Any, **options: Any) -> Any:
    """Load the base model with its weights, on the CPU unless `options` say otherwise.

    Raises:
        UnsupportedModelError: for custom code that is not trusted, or without safetensors weights.
    """
    from transformers import AutoModelForCausalLM

    # Otherwise transformers may load weights that a hub service converted, of another revision.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    with _as_refusals(source.model):
        _refuse_other_weights(source.model, source.revision)
        return AutoModelForCausalLM.from_pretrained(
            on_this_node(source.model, everything),
            use_safetensors=True,
            dtype=dtype,
            **source.options,
            **options,
        )


def empty_model(source: ModelSource, model_config: Any, **options: Any) -> Any:
    """Build the model from its config, without reading weights.

    Raises:
        UnsupportedModelError: for custom code that is not trusted.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    if source.trust_remote_code:
        known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model_config), None)
        is_loaded = known is not None and not known.__module__.startswith("transformers.")
        has_code = AutoModelForCausalLM.__name__ in (getattr(model_config, "auto_map", None) or {})
        if has_code and not is_loaded:
            options["code_revision"] = source.revision
    with _as_refusals(source.model):
        return AutoModelForCausalLM.from_config(
            model_config, trust_remote_code=source.trust_remote_code, **options
        )


def refuse_unsafe(source: ModelSource) -> None:
    """Refuse a model that needs custom code or pickled weights, before the run starts.

    No code of the model is executed here.

    Raises:
        UnsupportedModelError: with what was found and the fix.
    """
    folder = Path(source.model)
    for wanted, pickled in _PICKLED:
        if any(folder.glob(f"{pickled}*.bin")) and not any(folder.glob(f"{wanted}*.safetensors")):
            raise UnsupportedModelError(_no_safetensors(source.model))
    with _as_refusals(source.model):
        _refuse_other_weights(source.model, source.revision)
    if source.trust_remote_code:
        return
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    values: dict[str, Any] = {}
    if not folder.is_dir() or (folder / "config.json").is_file():
        values, _ = PreTrainedConfig.get_config_dict(
            os.fspath(source.model), revision=source.revision
        )
    code = values.get("auto_map") or {}  # also set by models that transformers has included since
    known = not code or type(load_model_config(source)) in MODEL_FOR_CAUSAL_LM_MAPPING
    if "AutoModelForCausalLM" in code and not known:
        raise UnsupportedModelError(_own_code(source.model))
    if "auto_map" in get_tokenizer_config(os.fspath(source.tokenizer), revision=source.revision):
        load_tokenizer(source)


def _refuse_other_weights(model: str | Folder, revision: str | None) -> None:
    """Refuse a model whose files name weights that are not its own safetensors.

    transformers reads what the index names: a pickle by its suffix, and a file anywhere. For
    adapters their base model is looked at, too.

    Raises:
        UnsupportedModelError: naming the index or the config, and what it names.
    """
    from transformers.utils import cached_file, find_adapter_config_file

    path = on_this_node(model, light)

    def read(name: str) -> dict[str, Any]:
        found = cached_file(
            path,
            name,
            revision=revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        content = read_json(Path(found)) if found else {}
        return content if isinstance(content, dict) else {}

    if os.path.isdir(path):
        indexes = sorted(file.name for file in Path(path).glob(f"*{_INDEX}"))
    else:
        indexes = [f"model{_INDEX}"] if read(f"model{_INDEX}") else []
    for index in indexes:
        files = read(index).get("weight_map")
        if not isinstance(files, dict):
            raise UnsupportedModelError(f"{model}: {index} has no weight_map; is it damaged?")
        for file in sorted({str(name) for name in files.values()}):
            if not (is_plain(file) and "/" not in file and file.endswith(".safetensors")):
                raise UnsupportedModelError(
                    f"{model}: {index} names {file!r}; weights are read from *.safetensors in the "
                    "same folder only"
                )
    if (other := read("config.json").get("transformers_weights")) is not None:
        raise UnsupportedModelError(
            f"{model}: config.json names {other!r} as transformers_weights; weights are read from "
            "model*.safetensors only: rename the file and delete the setting"
        )
    adapters = find_adapter_config_file(path, revision=revision)
    base = read_json(Path(adapters)).get("base_model_name_or_path") if adapters else None
    if base and base != path:
        _refuse_other_weights(base, None)


def on_this_node(model: str | Folder, wanted: Names) -> str:
    """A hub id, or the path of a folder whose wanted files are fetched where it is in a bucket."""
    return model if isinstance(model, str) else str(model.fetch(wanted).path)


@contextlib.contextmanager
def _as_refusals(name: str | Folder) -> Iterator[None]:
    """Convert the errors of transformers that mean custom code or no safetensors weights."""
    try:
        yield
    except (ValueError, OSError) as error:
        if "trust_remote_code" in str(error):
            raise UnsupportedModelError(_own_code(name)) from None
        if "safetensors" in str(error) and "file named" in str(error):
            raise UnsupportedModelError(_no_safetensors(name)) from None
        raise


def _own_code(name: str | Folder) -> str:
    return (
        f"{name} contains custom code, which is not run; review it, then set "
        "trust_remote_code=true and model_revision to the reviewed commit"
    )


def _no_safetensors(name: str | Folder) -> str:
    return (
        f"{name} has no safetensors weights, and pickled weights (*.bin) are never loaded, "
        "since they can run code; if its origin is trusted, convert it with save_pretrained()"
    )
