"""This project's step against TRL's ORPOTrainer, in turn: `python benchmarks/throughput.py`.

Both get the same model, the same pairs in the same order and the same batch; each side is a
process of its own. A round of one follows a round of the other, the first does not count, and of
the others the median does. `--through-ray` compares `jobs/train.py` with the bare step instead;
with `OMP_NUM_THREADS` below the number of cores, Ray's own processes have a core to themselves.
"""

import argparse
import dataclasses
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from flops import matmul_flops_per_s, useful_work
from orpo_ray.training.allocator import memory_settings
from sides import ROOT
from turns import SideFailedError, in_turn
from workload import (
    PAIRS_OF_4,
    SIZES,
    VOCABULARIES,
    Work,
    make_folder,
    make_ranking_folder,
)

DATA = ROOT.parent / "shared" / "data" / "hh_rlhf_harmless.jsonl"
BATCH = {"cpu": 8, "cuda": 32}
BUDGET_TOKENS = {"cpu": 8192, "cuda": 16_384}


def main(arguments: Sequence[str]) -> None:
    """Parse the command line and run every comparison it asks for."""
    # On several GPUs transformers' Trainer would spread TRL's batch over all of them.
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    os.environ["CUDA_VISIBLE_DEVICES"] = first
    args = parser().parse_args(arguments)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(highlight=False, soft_wrap=True)
    disable_progress_bar()
    if device == "cuda":
        os.environ.update(memory_settings(use_gpu=True))
    elif not torch.cuda.is_available():
        console.print("no GPU here: the 0.5b and 1b models on one are left out")
    for name in args.model or (["0.5b", "1b"] if device == "cuda" else ["5m", "50m", "5m:128k"]):
        size, _, vocabulary = name.partition(":")
        vocabulary = vocabulary or args.vocabulary
        if size not in SIZES or vocabulary not in VOCABULARIES:
            raise SystemExit(f"--model: {name} is not one of {', '.join(SIZES)}, or one:128k")
        with tempfile.TemporaryDirectory() as folder:
            work = Work(
                model=size,
                vocabulary=vocabulary,
                batch=(args.batch or BATCH[device]) * (PAIRS_OF_4 if args.ranking else 1),
                steps=args.steps or (10 if size == "5m" and vocabulary == "16k" else 4),
                rounds=args.rounds,
                device=device,
                folder=folder,
                budget_tokens=args.budget_tokens or BUDGET_TOKENS[device],
                gradient_checkpointing=args.trl_gradient_checkpointing,
            )
            if args.ranking:
                make_ranking_folder(Path(folder), size, vocabulary, work.n_pairs)
                result = grouped_against_apart(work)
            else:
                make_folder(Path(folder), args.data, size, vocabulary, work.n_pairs)
                measure = with_saves if args.saving else against_trl
                result = through_ray(work) if args.through_ray else measure(work)
        console.print(_table(result))
        print(json.dumps(result))


def parser() -> argparse.ArgumentParser:
    """The command line."""
    found = argparse.ArgumentParser(description=__doc__)
    found.add_argument("--model", action="append", help="5m, 50m, 0.5b, 1b, or one with :128k")
    found.add_argument("--vocabulary", choices=VOCABULARIES, default="16k")
    found.add_argument("--data", default=str(DATA), help="a file of pairs")
    found.add_argument("--batch", type=int, help="pairs a step: 8, on a GPU 32")
    found.add_argument("--steps", type=int, help="steps a round")
    found.add_argument("--rounds", type=int, default=3, help="rounds that count")
    found.add_argument("--device", choices=("cpu", "cuda"))
    found.add_argument("--budget-tokens", type=int, help="a microbatch's: 8192, on a GPU 16384")
    found.add_argument("--through-ray", action="store_true", help="jobs/train.py, bare step")
    found.add_argument("--ranking", action="store_true", help="grouped by prompt, pairs apart")
    found.add_argument("--saving", action="store_true", help="with and without checkpoints")
    found.add_argument("--trl-gradient-checkpointing", action="store_true")
    return found


def against_trl(work: Work) -> dict[str, Any]:
    """Rounds of both sides in turn, and what follows from them.

    TRL recomputes activations only where it was asked to, or does not fit without.
    """
    try:
        ours, theirs = in_turn(("orpo_ray", work), ("trl", work))
    except SideFailedError as error:
        if error.side != "trl" or not error.out_of_memory or work.gradient_checkpointing:
            raise
        print(
            "TRL does not fit without gradient checkpointing: both once more with its", flush=True
        )
        return against_trl(dataclasses.replace(work, gradient_checkpointing=True))
    peak = matmul_flops_per_s(work.device)
    counts = useful_work(work)
    pairs = work.batch * work.steps
    ours_s, theirs_s = statistics.median(ours.seconds), statistics.median(theirs.seconds)
    differences = [abs(a - b) for a, b in zip(ours.losses, theirs.losses, strict=True)]
    return described(work) | {
        "orpo_ray_pairs_per_s": pairs / ours_s,
        "trl_pairs_per_s": pairs / theirs_s,
        "ratio": theirs_s / ours_s,
        "useful_tokens_per_s": counts["useful_tokens"] / work.rounds / ours_s,
        "padded_over_useful_tokens": counts["padded_tokens"] / counts["useful_tokens"],
        "orpo_ray_peak_memory_gib": ours.peak_memory_bytes / 2**30,
        "trl_peak_memory_gib": theirs.peak_memory_bytes / 2**30,
        "memory_ratio": theirs.peak_memory_bytes / ours.peak_memory_bytes,
        "largest_loss_difference": max(differences),
        "matmul_peak_tflops_per_s": peak / 1e12,
        "mfu": counts["flops"] / work.rounds / ours_s / peak,
        "orpo_ray_attention": ours.attention,
        "trl_attention": theirs.attention,
        "orpo_ray_round_s": ours.seconds,
        "trl_round_s": theirs.seconds,
    }


def grouped_against_apart(work: Work) -> dict[str, Any]:
    """Rankings of 4 answers, 6 pairs: as prompt groups and as pairs apart, in turn."""
    together = dataclasses.replace(work, pairs_per_group=PAIRS_OF_4)
    apart, grouped = in_turn(("orpo_ray", work), ("orpo_ray", together))
    pairs = work.batch * work.steps
    apart_s, grouped_s = statistics.median(apart.seconds), statistics.median(grouped.seconds)
    return described(work) | {
        "apart_pairs_per_s": pairs / apart_s,
        "grouped_pairs_per_s": pairs / grouped_s,
        "ratio": apart_s / grouped_s,
        "first_loss_difference": abs(apart.losses[0] - grouped.losses[0]),
        "apart_round_s": apart.seconds,
        "grouped_round_s": grouped.seconds,
    }


def with_saves(work: Work) -> dict[str, Any]:
    """Rounds with one checkpoint each against rounds without, and what that is of 100 steps."""
    plain, saving = in_turn(("orpo_ray", work), ("orpo_ray", dataclasses.replace(work, saves=True)))
    plain_s, saving_s = statistics.median(plain.seconds), statistics.median(saving.seconds)
    return described(work) | {
        "step_s": plain_s / work.steps,
        "save_s": saving_s - plain_s,
        "share_of_100_steps": (saving_s - plain_s) / (100 * plain_s / work.steps),
        "plain_round_s": plain.seconds,
        "saving_round_s": saving.seconds,
    }


def through_ray(work: Work) -> dict[str, Any]:
    """`jobs/train.py` on the same work against the bare step, in turn, with the same allocator."""
    if work.device == "cpu":
        os.environ.update(memory_settings(use_gpu=False))
    bare, ray = in_turn(("orpo_ray", work), ("through_ray", work))
    pairs = work.batch * work.steps
    bare_s, ray_s = statistics.median(bare.seconds), statistics.median(ray.seconds)
    return described(work) | {
        "bare_pairs_per_s": pairs / bare_s,
        "through_ray_pairs_per_s": pairs / ray_s,
        "ratio": bare_s / ray_s,
        "bare_round_s": bare.seconds,
        "through_ray_round_s": ray.seconds,
    }


def described(work: Work) -> dict[str, Any]:
    """What was compared, on what."""
    facts = {k: v for k, v in asdict(work).items() if k != "folder"}
    return facts | {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "hardware": torch.cuda.get_device_name()
        if work.device == "cuda"
        else f"{os.cpu_count()} cores, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "trl": version("trl"),
    }


def commit() -> str:
    """Of this checkout: as `benchmarks/gpu` noted it, or git's; empty where there is neither."""
    if noted := os.environ.get("COMMIT"):
        return noted
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    except FileNotFoundError:
        return ""


def _table(result: dict[str, Any]) -> Table:
    table = Table(title=f"{result['model']}, vocabulary {result['vocabulary']}", show_header=False)
    for name, value in result.items():
        if isinstance(value, float):
            table.add_row(name.replace("_", " "), f"{value:.4g}")
    return table


if __name__ == "__main__":
    main(sys.argv[1:])
