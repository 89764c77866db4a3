"""A base model in a GGUF file: dequantized once into an ordinary folder; on the driver."""

import re
import shutil
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig

from orpo_ray.pretrained import UnsupportedModelError, refuse_incomplete
from orpo_ray.runs.manifest import fingerprint
from orpo_ray.storage.files import locked, one_line
from orpo_ray.storage.folder import Folder, light
from orpo_ray.storage.names import origin_of

_PART = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def convert_gguf(name: str, place: Folder) -> tuple[Folder, str]:
    """Convert a GGUF file to a folder of safetensors and tokenizer, unless that is done.

    Weights of a quantized file are stored in bfloat16, those of others in the file's type.

    Args:
        name: path of the file.
        place: folder of converted models, in which every file has one by its content.

    Returns:
        The folder, and a line that says what was made of what.

    Raises:
        UnsupportedModelError: for a file that transformers cannot read, or not whole.
    """
    file = Path(name).expanduser().resolve()
    if "://" in name or not file.is_file():
        where = (
            "GGUF files are read from disks: copy it to one" if "://" in name else "no such file"
        )
        raise UnsupportedModelError(f"{name}: {where}")
    if _PART.search(file.name):
        raise UnsupportedModelError(
            f"{name} is one of several parts: put them together with llama-gguf-split --merge"
        )
    try:
        origin_of(str(file))
    except ValueError as error:  # the package is missing
        raise UnsupportedModelError(str(error)) from error
    kind, dtype = _stored_as(file)
    folder = place.make() / f"{file.stem}-{fingerprint(file)['xxh3_128']}"
    with locked(place.path / ".lock"):
        if not (folder.fetch(light).path / "config.json").exists():
            beside = folder.path.with_name(f"{folder.path.name}.tmp")
            shutil.rmtree(beside, ignore_errors=True)
            try:
                _convert(file, beside, dtype)
            except UnsupportedModelError:
                raise
            # An architecture that is not supported, a damaged file, a type of quantization.
            except Exception as error:
                problem = f"{name}: transformers cannot load it: {one_line(error)}"
                raise UnsupportedModelError(problem) from error
            shutil.rmtree(folder.path, ignore_errors=True)
            beside.rename(folder.path)
            names = {path.name for path in folder.path.iterdir()} - {"config.json"}
            folder.publish(*sorted(names), "config.json")  # by which it is known to be whole
    return folder, f"{name} ({kind}) is dequantized to {dtype}, in {folder}".replace("torch.", "")


def _stored_as(file: Path) -> tuple[str, torch.dtype]:
    """The type that most weights are stored in, and the one that they are converted to.

    Raises:
        UnsupportedModelError: for a file that is none.
    """
    from gguf import GGUFReader

    sizes: dict[str, int] = {}
    try:
        for tensor in GGUFReader(file).tensors:
            kind = tensor.tensor_type.name
            sizes[kind] = sizes.get(kind, 0) + int(tensor.n_elements)
    except Exception as error:  # whatever numpy and struct say of such a file
        problem = f"{file}: no readable GGUF file: {one_line(error)}; download it again"
        raise UnsupportedModelError(problem) from error
    most = max(sizes, key=lambda kind: sizes[kind], default="F32")
    return most, _FLOATS.get(most, torch.bfloat16)


def _convert(file: Path, folder: Path, dtype: torch.dtype) -> None:
    """Write what is loaded from a GGUF, which cannot be saved, by a model of the same config."""
    origin = origin_of(str(file))
    config = AutoConfig.from_pretrained(**origin)
    tokenizer = AutoTokenizer.from_pretrained(**origin)
    loaded, found = AutoModelForCausalLM.from_pretrained(
        **origin,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
        ignore_mismatched_sizes=True,  # they are refused below, by name
        output_loading_info=True,
    )
    refuse_incomplete(file.name, found)
    config.dtype = dtype
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.load_state_dict(loaded.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
