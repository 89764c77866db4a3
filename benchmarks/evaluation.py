"""Evaluating a model beside TRL's evaluation loop, in turn: `python benchmarks/evaluation.py`.

Both score the same pairs of a file with the same model, in one process: TRL's
`ORPOTrainer.evaluate()`, and what a worker of `jobs/evaluate.py` runs, without Ray. A round of one
follows a round of the other, the first does not count, and of the others the median does.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from workload import MAX_LENGTH, make_folder

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "hh_rlhf_harmless.jsonl"
BATCH = 16


def orpo_ray_round(folder: Path, device: torch.device) -> Callable[[], float]:
    """Scores all pairs; gives the accuracy. Needs a process group."""
    from orpo_ray.config.schema import ORPOConfig
    from orpo_ray.dataset.order import Order
    from orpo_ray.dataset.shards import TokenSet
    from orpo_ray.dataset.stream import BatchPlan, TokenStream
    from orpo_ray.models.build import build_evaluated_model
    from orpo_ray.objective.objectives import objective_of
    from orpo_ray.training.budget import head_chunk
    from orpo_ray.training.evaluation import evaluate_streams

    tokens = TokenSet.load(str(folder / "tokens-1"))
    assert tokens is not None
    config = ORPOConfig(
        per_device_eval_batch_size=BATCH,
        max_length=MAX_LENGTH,
        max_tokens_per_microbatch=8192,
        bf16=device.type == "cuda",
    )
    model = build_evaluated_model(config, str(folder / "model"), device)
    order = Order(tuple(shard.n_groups for shard in tokens.shards), 1, 0, shuffle=False)
    chunk_tokens = head_chunk(config, model, device)
    plan = BatchPlan(256, config.eval_microbatch_tokens, chunk_tokens, prompt_counts=True)
    streams = {"eval_": TokenStream(tokens, order, plan, rank=0, world_size=1)}

    def score() -> float:
        found = evaluate_streams(model, streams, objective_of(config.orpo), device)
        return float((found.scores["eval_"]["margin"].to_numpy() > 0).mean())

    return score


def trl_round(folder: Path, device: torch.device) -> Callable[[], float]:
    """The same by TRL."""
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    rows = Dataset.from_dict(json.loads((folder / "pairs.json").read_text()))
    trainer = ORPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(
            folder / "model", dtype=torch.float32, attn_implementation="sdpa"
        ),
        args=ORPOConfig(
            output_dir=str(folder / "trl"),
            per_device_eval_batch_size=BATCH,
            max_length=MAX_LENGTH,
            bf16=device.type == "cuda",
            report_to="none",
            disable_tqdm=True,
        ),
        train_dataset=rows.select(range(BATCH)),
        eval_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(folder / "model"),
    )
    return lambda: float(trainer.evaluate()["eval_rewards/accuracies"])


def main() -> int:
    """Run both sides in turn and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="5m", help="5m, 50m, 0.5b or 1b")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count")
    parser.add_argument("--data", default=str(DATA))
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory(prefix="orpo-evaluation-") as name:
        folder = Path(name)
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{folder / 'rendezvous'}",
            rank=0,
            world_size=1,
        )
        make_folder(folder, arguments.data, arguments.model, "16k", arguments.pairs)
        sides = {"orpo_ray": orpo_ray_round(folder, device), "trl": trl_round(folder, device)}
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        accuracies: dict[str, float] = {}
        for _ in range(arguments.rounds + 1):
            for side, work in sides.items():
                started = time.perf_counter()
                accuracies[side] = work()
                seconds[side].append(time.perf_counter() - started)
    dist.destroy_process_group()
    rates: dict[str, Any] = {
        side: arguments.pairs / statistics.median(taken[1:]) for side, taken in seconds.items()
    }
    result = {
        "model": arguments.model,
        "pairs": arguments.pairs,
        "device": str(device),
        **{f"{side}_pairs_per_s": round(rate, 2) for side, rate in rates.items()},
        "ratio": round(rates["orpo_ray"] / rates["trl"], 2),
        "accuracies": accuracies,
    }
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
