"""What a device can compute, and what the useful part of a benchmark's rounds asks of it."""

import time

import torch
from transformers import AutoConfig

from orpo_ray.preference.packing import pack
from orpo_ray.preference.shards import read_shard
from workload import Work, padded_tokens


def matmul_flops_per_s(device: str) -> float:
    """The rate of one large matrix product, the best of several: fp32 on a CPU, bf16 on a GPU."""
    n, dtype = (8192, torch.bfloat16) if device == "cuda" else (2048, torch.float32)
    left, right = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(8):
        if device == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        left @ right
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def useful_work(work: Work) -> dict[str, float]:
    """Tokens and floating-point operations of the rounds that count.

    6 operations for a weight and token it multiplies (2 forward, 4 backward), the head's only
    where it predicts something; and 12 for a query, key and width of head, for those that see one
    another.
    """
    config = AutoConfig.from_pretrained(f"{work.folder}/model")
    width, layers = config.hidden_size, config.num_hidden_layers
    head_width = width // config.num_attention_heads
    attention = 2 * width * head_width * (config.num_attention_heads + config.num_key_value_heads)
    block = attention + 3 * width * config.intermediate_size
    groups = read_shard(f"{work.tokens}/0.parquet")[work.batch * work.steps :]
    tokens = padded = flops = 0
    for first in range(0, len(groups), work.batch):
        batch = groups[first : first + work.batch]
        row = pack(batch, 1 << 30, True)
        tokens += len(row.token_ids)
        padded += padded_tokens(batch)
        seen = sum(
            len(g.prompt) * (len(g.prompt) + 1) // 2
            + sum(len(c) * len(g.prompt) + len(c) * (len(c) + 1) // 2 for c in g.completions)
            for g in batch
        )
        flops += 6 * layers * block * len(row.token_ids)
        flops += 6 * config.vocab_size * width * len(row.positions)
        flops += 12 * layers * width * seen
    return {"useful_tokens": tokens, "padded_tokens": padded, "flops": flops}
