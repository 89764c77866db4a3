"""What the useful part of a benchmark's rounds asks of a device, and what the device can do."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from orpo_ray.dataset.packing import pack
from orpo_ray.dataset.shards import read_shard
from orpo_ray.training import flops
from workload import Work, padded_tokens


def matmul_flops_per_s(device: str) -> float:
    """The rate of one large matrix product, the best of several: fp32 on a CPU, bf16 on a GPU."""
    if device == "cuda":
        return flops.matmul_rate(torch.device("cuda"), torch.bfloat16, 8192)
    return flops.matmul_rate(torch.device("cpu"), torch.float32, 2048)


def useful_work(work: Work) -> dict[str, float]:
    """Tokens and floating-point operations of the rounds that count."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(f"{work.folder}/model"))
    counted = flops.Work.from_model(model)
    groups = read_shard(f"{work.tokens}/0.parquet")[work.batch * work.steps :]
    tokens = padded = operations = 0.0
    for first in range(0, len(groups), work.batch):
        batch = groups[first : first + work.batch]
        row = pack(batch, 1 << 30, True)
        tokens += len(row.token_ids)
        padded += padded_tokens(batch)
        operations += counted.flops(row)
    return {"useful_tokens": tokens, "padded_tokens": padded, "flops": operations}
