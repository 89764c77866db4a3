"""Loading a run's base model, config and tokenizer: safetensors only, custom code only on request.

Used on the driver, training workers and data tasks; imports transformers only when it loads.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orpo_ray.config.model import ModelSection
from orpo_ray.storage.files import first_line, one_line, read_json, some_of
from orpo_ray.storage.folder import Folder, Names, everything, light
from orpo_ray.storage.names import is_plain, origin_of
from orpo_ray.storage.relocation import find_base


class UnsupportedModelError(ValueError):
    """A model whose loss this project would compute wrongly, or cannot compute at all."""


_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
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
        UnsupportedModelError: for custom code that is not trusted, and for a tokenizer that is
            missing or cannot be read.
    """
    from transformers import AutoTokenizer

    folder = on_this_node(source.tokenizer, light)
    try:
        with _as_refusals(source.tokenizer):
            tokenizer = AutoTokenizer.from_pretrained(**origin_of(folder), **source.options)
    except UnsupportedModelError:
        raise
    except Exception as error:  # whatever transformers, tokenizers and JSON say of such files
        raise UnsupportedModelError(_no_tokenizer(source.tokenizer, folder, error)) from error
    if not source.trust_remote_code and Path(folder).is_dir():
        # transformers makes an empty vocabulary for a class whose files are missing.
        files = {"tokenizer.json", "tekken.json", *tokenizer.vocab_files_names.values()}
        if not any(Path(folder, name).is_file() for name in files):
            raise UnsupportedModelError(_no_tokenizer(source.tokenizer, folder))
    if source.chat_template is not None:
        tokenizer.chat_template = source.chat_template
    return tokenizer


def load_model_config(source: ModelSource) -> Any:
    """Load the base model's config.

    Raises:
        UnsupportedModelError: for custom code that is not trusted, and for a config that
            transformers cannot load.
    """
    from transformers import AutoConfig

    folder = on_this_node(source.model, light)
    try:
        with _as_refusals(source.model):
            return AutoConfig.from_pretrained(**origin_of(folder), **source.options)
    except UnsupportedModelError:
        raise
    except Exception as error:  # configs are checked by code of every family
        problem = f"{source.model}: its config.json cannot be loaded: {one_line(error)}"
        raise UnsupportedModelError(problem) from error


def load_model(source: ModelSource, dtype: Any, **options: Any) -> Any:
    """Load the base model with its weights, on the CPU unless `options` say otherwise.

    Raises:
        UnsupportedModelError: for custom code that is not trusted, without safetensors weights, and
            for weights that are missing, have another shape than the config's, or are not finite.
    """
    from transformers import AutoModelForCausalLM

    # Otherwise transformers may load weights that a hub service converted, of another revision.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    folder = on_this_node(source.model, everything)
    base = base_of_adapters(source, folder) or ""
    is_here = os.path.isdir(base)  # not always where the adapters name it
    with _as_refusals(source.model):
        _refuse_other_weights(source, folder)
        model, found = AutoModelForCausalLM.from_pretrained(
            base if is_here else folder,
            use_safetensors=True,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # they are refused below, by name
            output_loading_info=True,
            **source.options,
            **options,
        )
    refuse_incomplete(source.model, found)
    if is_here:
        model.load_adapter(folder)
    _refuse_not_finite(source.model, model)
    return model


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
    if folder.is_dir():
        weight_files(source)
        with _as_refusals(source.model):
            _refuse_other_weights(source, str(folder))
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


def weight_files(source: ModelSource) -> list[Path]:
    """The safetensors files of a model in a local folder, whether or not they exist."""
    folder = Path(source.model)
    index = folder / _INDEX
    if (folder / _WEIGHTS).is_file() or not index.is_file():
        return [folder / _WEIGHTS]
    return [folder / name for name in _indexed(source.model, index)]


def _refuse_other_weights(source: ModelSource, folder: str) -> None:
    """Refuse a model whose files name weights that are not its own safetensors.

    transformers reads what they name: a pickle by its suffix, and a file anywhere. For adapters
    their base model is looked at, too.

    Args:
        source: of the model.
        folder: its folder on this node, or its hub id.
    """
    from transformers.utils import cached_file

    def find(name: str) -> Path | None:
        found = cached_file(
            folder,
            name,
            revision=source.revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        return Path(found) if found else None

    # In a folder also those of variants of the weights.
    indexes: list[Path | None] = [find(_INDEX)]
    if os.path.isdir(folder):
        indexes = list(Path(folder).glob("*.safetensors.index.json"))
    for index in indexes:
        if index is not None:
            _indexed(source.model, index)
    config = find("config.json")
    if config is not None and (other := read_json(config).get("transformers_weights")) is not None:
        raise UnsupportedModelError(
            f"{source.model}: config.json names {other!r} as transformers_weights; weights are "
            "read from model*.safetensors only: rename the file and delete the setting"
        )
    base = base_of_adapters(source, folder)
    if base is not None and base != folder:
        _refuse_other_weights(dataclasses.replace(source, model=base, revision=None), base)


def base_of_adapters(source: ModelSource, folder: str) -> str | None:
    """Folder or hub id of the base model of LoRA adapters, in `folder`; None for other models.

    Raises:
        UnsupportedModelError: for a base model that is not there.
    """
    from transformers.utils import find_adapter_config_file

    config = find_adapter_config_file(folder, revision=source.revision)
    named = read_json(Path(config)).get("base_model_name_or_path") if config else None
    if not config or not named:
        return None
    base = find_base(named, Path(config).parent)
    if base is None:
        raise UnsupportedModelError(
            f"{source.model}: its base model is not there: {named}; put that folder beside the "
            "adapter's, or set base_model_name_or_path in adapter_config.json to where it is"
        )
    return base


def _indexed(name: str | Folder, index: Path) -> list[str]:
    """The files that an index of weights names."""
    try:
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = f"{name}: {index.name} is no index of weights: {first_line(error)}"
        raise UnsupportedModelError(problem) from error
    odd = [f for f in files if not _is_own_weights(f)]
    if odd:
        raise UnsupportedModelError(
            f"{name}: {index.name} names {odd[0]!r}; only safetensors files in the same folder "
            "are read"
        )
    return files


def _is_own_weights(file: object) -> bool:
    is_name = isinstance(file, str) and is_plain(file) and "/" not in file
    return is_name and str(file).endswith(".safetensors")


def refuse_incomplete(name: str | Folder, found: Mapping[str, Any]) -> None:
    """Refuse a model of which transformers would draw some weights at random.

    Args:
        name: folder or hub id.
        found: what `from_pretrained` gives with `output_loading_info`.

    Raises:
        UnsupportedModelError: naming the weights.
    """
    # A parameter that several tensors are made of is listed as both when one of them is missing.
    shapes = {weight: (tuple(ours), tuple(own)) for weight, ours, own in found["mismatched_keys"]}
    missing = sorted(set(found["missing_keys"]) - shapes.keys())
    if missing:
        raise UnsupportedModelError(
            f"{name}: {len(missing)} of the model's weights are missing in its safetensors files: "
            f"{some_of(missing)}; save or download the model again"
        )
    if shapes:
        texts = [
            f"{weight} is {a}, by config.json {b}" for weight, (a, b) in sorted(shapes.items())
        ]
        raise UnsupportedModelError(
            f"{name}: {len(shapes)} weights have another shape than the model: {some_of(texts)}; "
            "give the config.json that they were saved with"
        )


def _refuse_not_finite(name: str | Folder, model: Any) -> None:
    """Refuse weights that are NaN or infinite, which would look like bad rows later.

    Raises:
        UnsupportedModelError: naming them.
    """
    import torch

    checked = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    bad = [
        weight
        for weight, values in model.named_parameters()
        if values.dtype in checked
        and values.numel()
        # The least and the largest value are NaN where any is; nothing is allocated for it.
        and not all(extreme.isfinite() for extreme in torch.aminmax(values.detach()))
    ]
    if bad:
        raise UnsupportedModelError(
            f"{name}: {len(bad)} of the model's weights are not finite (NaN or infinite): "
            f"{some_of(bad)}; save or download the model again"
        )


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
    except RuntimeError as error:
        # Of tensors that several weights are made of, such as experts, when some do not fit.
        if "conversion of the weights" in str(error):
            raise UnsupportedModelError(_not_convertible(name)) from error
        raise


def _own_code(name: str | Folder) -> str:
    return (
        f"{name} contains custom code, which is not run; review it, then set "
        "trust_remote_code=true and model_revision to the reviewed commit"
    )


def _not_convertible(name: str | Folder) -> str:
    return (
        f"{name}: some weights are missing or have another shape than the model, so that "
        "transformers cannot put them together; the log of a worker has its report; save or "
        "download the model again"
    )


def _no_tokenizer(name: str | Folder, folder: str, error: Exception | None = None) -> str:
    path = Path(folder)
    if error and (not path.is_dir() or (path / "tokenizer.json").is_file()):
        return f"{name}: its tokenizer cannot be loaded: {first_line(error)}"
    return (
        f"{name} holds no tokenizer (tokenizer.json) that can be loaded; save the base model's "
        "there with AutoTokenizer.from_pretrained(...).save_pretrained(...)"
    )


def _no_safetensors(name: str | Folder) -> str:
    return (
        f"{name} has no safetensors weights, and pickled weights (*.bin) are never loaded, "
        "since they can run code; if its origin is trusted, convert it with save_pretrained()"
    )
