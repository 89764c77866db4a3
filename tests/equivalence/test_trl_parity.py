"""The whole product against TRL 1.16's ORPOTrainer: same weights, pairs and order, in fp32."""

import itertools
import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.conftest import ROOT

N_STEPS, BATCH, MAX_LENGTH = 16, 8, 1024
LAST_TURN = "\n\nAssistant:"
SHARED_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "log_odds_chosen",
    "log_odds_ratio",
    "nll_loss",
    "logps/chosen",
    "logps/rejected",
)


def cut(dialogue: str) -> tuple[str, str]:
    border = dialogue.rindex(LAST_TURN) + len(LAST_TURN)
    return dialogue[:border], dialogue[border:]


def usable_rows(shared_data, tokenizer) -> list[dict[str, str]]:
    """The first 128 rows with two answers whose prompt leaves room for them."""
    lines = (shared_data / "hh_rlhf_harmless.jsonl").read_text().splitlines()

    def usable(row: dict[str, str]) -> bool:
        prompt, chosen = cut(row["chosen"])
        fits = len(tokenizer(prompt)["input_ids"]) < MAX_LENGTH - 1
        return fits and bool(chosen.strip()) and bool(cut(row["rejected"])[1].strip())

    return list(itertools.islice(filter(usable, map(json.loads, lines)), N_STEPS * BATCH))


def make_model(folder, texts) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with distinct special tokens and a random llama, on disk."""
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
    torch.manual_seed(0)
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
    LlamaForCausalLM(config).save_pretrained(folder)
    return tokenizer


@pytest.mark.timeout(600)
def test_sixteen_steps_equal_trl(shared_data, run_command, tmp_path):
    """Per-step loss and metrics within 1e-4 of TRL's, final weights within 1e-5 of them."""
    raw = (shared_data / "hh_rlhf_harmless.jsonl").read_text().splitlines()
    tokenizer = make_model(tmp_path / "model", (json.loads(line)["chosen"] for line in raw))
    rows = usable_rows(shared_data, tokenizer)
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run_command(
        tmp_path,
        "jobs/train.py",
        "train_files=pairs.jsonl",
        f"model_name_or_path={tmp_path / 'model'}",
        f"max_steps={N_STEPS}",
        f"per_device_train_batch_size={BATCH}",
        f"max_length={MAX_LENGTH}",
        "max_tokens_per_microbatch=1500",
        "learning_rate=1e-3",
        "logging_steps=1",
        "shuffle=false",
        "bf16=false",
        "run_name=parity",
    )
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "parity"
    ours = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    theirs = trl_history(tmp_path, rows)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for our, their in zip(ours, theirs, strict=True):
        assert our["loss"] == pytest.approx(their["loss"], abs=1e-4)
        for name in SHARED_METRICS:
            assert our[name] == pytest.approx(their[name], abs=1e-4), name
        assert our["grad_norm"] == pytest.approx(their["grad_norm"], rel=1e-3)
        assert our["learning_rate"] == pytest.approx(their["learning_rate"])
    our_weights = load_file(run / "final" / "model.safetensors")
    their_weights = load_file(tmp_path / "trl" / "model.safetensors")
    assert our_weights.keys() == their_weights.keys()
    differences = [(our_weights[k] - their_weights[k]).abs().max().item() for k in our_weights]
    assert max(differences) < 1e-5


def trl_history(folder, rows) -> list[dict[str, float]]:
    """What TRL logs on the same pairs, a dict a step."""
    prompts, chosen = zip(*(cut(row["chosen"]) for row in rows), strict=True)
    rejected = [cut(row["rejected"])[1] for row in rows]
    pairs = {"prompt": prompts, "chosen": chosen, "rejected": rejected}
    (folder / "pairs.json").write_text(json.dumps(pairs))
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
