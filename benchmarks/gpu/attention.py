"""Every attention kernel over packed rows: its error against float64, and its time."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from orpo_ray.dataset.packing import GroupSpan
from orpo_ray.models.attention.interface import _KERNELS
from orpo_ray.models.attention.layout import PackedLayout, Scores
from results import CUDA, DEVICE, DRY, attempt, median_s, print_machine, record, wait

HALF = torch.bfloat16
LIMITS = {torch.bfloat16: 1e-2, torch.float32: 1e-4}  # relative error above which it is wrong
# No completion, no prompt, one token, three completions; lengths that fill no block.
ODD = (
    GroupSpan(7, (5, 3)),
    GroupSpan(0, (2, 9)),
    GroupSpan(150, (40, 1, 170)),
    GroupSpan(1, ()),
    GroupSpan(300, (2, 130)),
)


@dataclass(frozen=True)
class Case:
    """One kernel with one shape of heads and scores.

    Args:
        kernel: key of `attention._KERNELS`.
        heads: of queries, and of keys and values.
        width: of a head.
        window: positions that a query sees; None: all before it.
        softcap: logit soft-capping; None: none.
        dtype: of queries, keys and values.
    """

    kernel: str
    heads: tuple[int, int] = (32, 8)
    width: int = 64
    window: int | None = None
    softcap: float | None = None
    dtype: torch.dtype = HALF


def main() -> None:
    """Errors and times of the kernels that need no compilation, then FlexAttention's."""
    print_machine()
    rows = {"32 pairs": short_pairs(2 if DRY else 32)}
    if CUDA:
        rows["4 long pairs"] = tuple(GroupSpan(2000, (1000, 900)) for _ in range(4))
    layouts = {name: PackedLayout(spans, DEVICE) for name, spans in rows.items()}
    compiled, others = cases()
    _errors("attention, varlen and sdpa", others)
    for kernel in ("varlen", "sdpa") if CUDA else ("sdpa",):
        for name, layout in layouts.items():
            _time(kernel, name, layout)
    _errors("attention, flex", compiled)
    if CUDA:
        for name, layout in layouts.items():
            _time("flex", name, layout)


def cases() -> tuple[list[Case], list[Case]]:
    """FlexAttention's, and the others'."""
    if not CUDA:
        return [], [Case("sdpa", (4, 2), 16), Case("sdpa", (4, 2), 16, window=4)]
    flex = [
        Case("flex"),
        Case("flex", window=64),
        Case("flex", (8, 4), 128, softcap=30.0),
        Case("flex", (4, 2), dtype=torch.float32),
    ]
    others = [
        Case("varlen", heads, width, window)
        for heads in ((32, 8), (20, 5), (16, 16), (6, 1))
        for width in (64, 128)
        for window in (None, 1, 64, 300)
    ]
    others += [
        Case("varlen", (4, 2), 8),
        Case("varlen", (4, 2), 16, window=4),
        Case("varlen", (8, 4), 256),
        Case("sdpa"),
        Case("sdpa", window=64),
    ]
    return flex, others


def short_pairs(n: int) -> tuple[GroupSpan, ...]:
    """Prompts and answers about as long as those of hh-rlhf."""
    prompts = [40 + 7 * (i * 11 % 23) for i in range(n)]
    answers = [10 + 5 * (i * 7 % 19) for i in range(n)]
    return tuple(GroupSpan(p, (a, a + 9)) for p, a in zip(prompts, answers, strict=True))


def _inputs(layout: PackedLayout, case: Case) -> list[Tensor]:
    """Query, key, value and the output's gradient, laid out as a decoder passes them."""
    torch.manual_seed(0)
    n_heads, n_kv = case.heads
    made = [torch.randn(1, layout.n_tokens, n, case.width) for n in (n_heads, n_kv, n_kv, n_heads)]
    *qkv, upstream = (t.to(DEVICE, case.dtype) for t in made)
    return [*(t.transpose(1, 2) for t in qkv), upstream]


def _gradients(
    kernel: str, layout: PackedLayout, scores: Scores, inputs: list[Tensor]
) -> list[Tensor]:
    """The output of a kernel, and the gradients of query, key and value."""
    *qkv, upstream = inputs
    leaves = [t.detach().clone().requires_grad_() for t in qkv]
    output = _KERNELS[kernel](*leaves, layout, scores)
    output.backward(upstream)
    return [output.detach(), *(t.grad for t in leaves if t.grad is not None)]


def _errors(part: str, chosen: list[Case]) -> None:
    """The largest relative error; a case of its own line where it is wrong or was compiled."""
    layout, worst, wrong = PackedLayout(ODD, DEVICE), 0.0, 0
    for case in chosen:
        what: dict[str, Any] = asdict(case) | {"dtype": str(case.dtype)}
        with attempt(part, **what):
            scores = Scores(case.width**-0.5, case.window, case.softcap)
            inputs = _inputs(layout, case)
            started = time.perf_counter()
            found = _gradients(case.kernel, layout, scores, inputs)
            wait()
            taken = time.perf_counter() - started
            expected = _gradients("sdpa", layout, scores, [t.double() for t in inputs])
            # With a window of 1 every probability is 1, and the gradients of query and key are 0.
            size = inputs[-1].double().norm()
            errors = [
                ((a.double() - b).norm() / (b.norm() if b.any() else size)).item()
                for a, b in zip(found, expected, strict=True)
            ]
            right = max(errors) < LIMITS[case.dtype]  # false for NaN, too
            worst, wrong = max(worst, *errors), wrong + (not right)
            if not right or case.kernel == "flex":
                record(part, **what, errors=errors, seconds=taken, right=right)
    record(part, cases=len(chosen), wrong=wrong, worst_error=worst)


def _time(kernel: str, name: str, layout: PackedLayout) -> None:
    """Milliseconds of the forward pass, and of it with the backward pass."""
    with attempt("attention, time", kernel=kernel, row=name):
        case, scores = Case(kernel), Scores(0.125, None, None)
        inputs = _inputs(layout, case)
        tries = 2 if DRY else 10
        with torch.no_grad():
            forward = median_s(lambda: _KERNELS[kernel](*inputs[:3], layout, scores), tries)
        both = median_s(lambda: _gradients(kernel, layout, scores, inputs), tries)
        seen = sum(s.length * ((s.length + 1) / 2 + s.prompt_length) for s in layout.segments)
        record(
            "attention, time",
            kernel=kernel,
            row=name,
            n_tokens=layout.n_tokens,
            forward_ms=1e3 * forward,
            forward_and_backward_ms=1e3 * both,
            tflops=14 * seen * case.width * case.heads[0] / both / 1e12,
        )


if __name__ == "__main__":
    main()
