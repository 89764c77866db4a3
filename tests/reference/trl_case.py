"""Sixteen steps of TRL 1.16's ORPOTrainer on real dialogues: the case, and what TRL makes of it.

`python -m tests.reference.trl_case DATA` (`make oracle`) runs TRL and stores its trajectory in
`trl_trajectory.json`, with the versions and a digest of what it was given.
"""

import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent.parent
STORED = Path(__file__).with_name("trl_trajectory.json")
DATA = "hh_rlhf_harmless.jsonl"
N_STEPS, BATCH, MAX_LENGTH = 16, 8, 1024
LAST_TURN = "\n\nAssistant:"
N_PROBES = 32  # weights of each tensor that are stored


def write_case(data: Path, folder: Path) -> None:
    """Write the model, and the same 128 pairs as `pairs.jsonl` (dialogues) and for TRL."""
    lines = data.read_text().splitlines()
    tokenizer = _write_model(folder / "model", (json.loads(line)["chosen"] for line in lines))
    rows = _usable_rows(lines, tokenizer)
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts, chosen = zip(*(_cut(row["chosen"]) for row in rows), strict=True)
    rejected = [_cut(row["rejected"])[1] for row in rows]
    pairs = {"prompt": prompts, "chosen": chosen, "rejected": rejected}
    (folder / "pairs.json").write_text(json.dumps(pairs))


def digest(folder: Path) -> str:
    """Of everything that decides the trajectory, but the libraries."""
    parts = [(folder / "pairs.jsonl").read_bytes()]
    vocabulary = PreTrainedTokenizerFast.from_pretrained(folder / "model").get_vocab()
    parts.append(json.dumps(sorted(vocabulary.items())).encode())
    weights = load_file(folder / "model" / "model.safetensors")
    parts += [weights[name].numpy().tobytes() for name in sorted(weights)]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def probes(path: Path) -> dict[str, list[float]]:
    """A few weights of every tensor of a safetensors file, evenly spaced."""
    return {
        name: tensor.flatten()[:: max(1, tensor.numel() // N_PROBES)][:N_PROBES].tolist()
        for name, tensor in sorted(load_file(path).items())
    }


def run_trl(folder: Path) -> list[dict[str, float]]:
    """Train with TRL in a process of its own, into `trl/`; what it logs, a dict a step."""
    arguments = {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": BATCH,
        "max_steps": N_STEPS,
        "max_length": MAX_LENGTH,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "train_sampling_strategy": "sequential",
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    job = {
        "model": str(folder / "model"),
        "pairs": str(folder / "pairs.json"),
        "arguments": arguments,
        "answer": str(folder / "answer.json"),
    }
    (folder / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, "-m", "tests.reference.trl_run", str(folder / "job.json")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [line for line in json.loads((folder / "answer.json").read_text()) if "loss" in line]


def _cut(dialogue: str) -> tuple[str, str]:
    border = dialogue.rindex(LAST_TURN) + len(LAST_TURN)
    return dialogue[:border], dialogue[border:]


def _usable_rows(lines: list[str], tokenizer: Any) -> list[dict[str, str]]:
    """The first rows with two answers whose prompt leaves room for them."""

    def usable(row: dict[str, str]) -> bool:
        prompt, chosen = _cut(row["chosen"])
        fits = len(tokenizer(prompt)["input_ids"]) < MAX_LENGTH - 1
        return fits and bool(chosen.strip()) and bool(_cut(row["rejected"])[1].strip())

    return list(itertools.islice(filter(usable, map(json.loads, lines)), N_STEPS * BATCH))


def _write_model(folder: Path, texts: Any) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with distinct special tokens and a random llama.

    NumPy's random numbers are the same on every machine and version; torch's are not.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=2000,
            special_tokens=["<s>", "</s>", "<pad>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=2000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # norms stay at 1
                values = 0.02 * rng.standard_normal(parameter.shape)
                parameter.copy_(torch.from_numpy(values))
    model.save_pretrained(folder)
    return tokenizer


def main(data: str) -> None:
    """Run TRL and store what it did."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_case(Path(data), folder)
        stored = {
            "versions": {name: version(name) for name in ("trl", "transformers", "torch")},
            "digest": digest(folder),
            "steps": run_trl(folder),
            "weights": probes(folder / "trl" / "model.safetensors"),
        }
    STORED.write_text(json.dumps(stored, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
