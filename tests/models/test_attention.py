"""Kernels of packed attention: which one is chosen, and that all compute the same."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from torch import library
from torch.nn.attention.flex_attention import create_block_mask

from orpo_ray.dataset.packing import GroupSpan, pack
from orpo_ray.models.attention import interface
from orpo_ray.models.attention.flex import flex, packed_block_mask, seen_blocks
from orpo_ray.models.attention.interface import by_segment
from orpo_ray.models.attention.kernels import KernelSupport, choose_kernel, kernel_support
from orpo_ray.models.attention.layout import PackedLayout, Scores
from orpo_ray.models.attention.varlen import varlen
from orpo_ray.models.microbatch import Microbatch
from orpo_ray.models.orpo_model import OrpoModel
from orpo_ray.objective.head import LossScale
from orpo_ray.objective.objectives import orpo
from orpo_ray.pretrained import UnsupportedModelError
from tests.reference.models import odd_groups, tiny_model

H100 = KernelSupport(
    capability=(9, 0),
    half=True,
    softcap=False,
    widths=(128, 128),
    has_triton=True,
)
# Of other shapes than blocks of 128: no prompt, one token, a ranking, no answer.
SPANS = (
    GroupSpan(7, (5, 3)),
    GroupSpan(0, (2, 9)),
    GroupSpan(150, (40, 1, 170)),
    GroupSpan(1, ()),
    GroupSpan(300, (2, 130)),
)
eager_flex = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture
def traced_again():
    """Off a GPU torch traces FlexAttention at every shape, and has a limit for those."""
    torch._dynamo.reset()


def windows_by_heads(windows, heads):
    """Every window with every number of heads; `make test` runs each window once."""
    return [
        pytest.param(w, *h, marks=[] if j == i % len(heads) else pytest.mark.slow)
        for i, w in enumerate(windows)
        for j, h in enumerate(heads)
    ]


def heads(layout: PackedLayout, n_heads: int, n_kv: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Random query, key and value of a row, and what the output's gradient is to be."""
    torch.manual_seed(0)
    shapes = [(1, n, layout.n_tokens, 16) for n in (n_heads, n_kv, n_kv)]
    shapes.append((1, layout.n_tokens, n_heads, 16))
    return [torch.randn(s, dtype=dtype, device=layout.device) for s in shapes]


def with_gradients(kernel, layout, scores, inputs) -> list[torch.Tensor]:
    """A kernel's output, and the gradients of query, key and value."""
    *qkv, upstream = inputs
    leaves = [t.clone().requires_grad_() for t in qkv]
    output = kernel(*leaves, layout, scores)
    output.backward(upstream)
    return [output.detach(), *(t.grad for t in leaves)]


@pytest.mark.parametrize(
    ("changes", "kernel"),
    [
        ({}, "varlen"),
        ({"has_triton": False}, "varlen"),
        ({"half": False}, "flex"),
        ({"half": False, "has_triton": False}, "sdpa"),
        ({"softcap": True}, "flex"),
        ({"softcap": True, "has_triton": False}, "sdpa"),
        ({"widths": (192, 128)}, "flex"),
        ({"widths": (512, 512)}, "flex"),
        ({"half": False, "widths": (8, 8)}, "sdpa"),
        ({"capability": (7, 5)}, "sdpa"),
        ({"capability": None}, "sdpa"),
    ],
)
def test_the_first_kernel_that_can_run_is_chosen(changes, kernel):
    assert choose_kernel("auto", dataclasses.replace(H100, **changes)) == kernel


@pytest.mark.parametrize("kernel", ["varlen", "flex", "sdpa"])
def test_a_kernel_that_is_asked_for_is_taken(kernel):
    assert choose_kernel(kernel, H100) == kernel


@pytest.mark.parametrize(
    ("kernel", "changes", "reason"),
    [
        ("flex", {"capability": None}, "it runs on GPUs only"),
        ("flex", {"widths": (8, 8)}, "heads narrower than 16"),
        ("varlen", {"softcap": True}, "it does not support the logit soft-capping"),
        ("varlen", {"half": False}, "set bf16=true"),
        ("flex", {"has_triton": False}, "pip install triton"),
        ("varlen", {"widths": (512, 512)}, "heads of width 512"),
    ],
)
def test_a_kernel_that_cannot_run_is_refused_with_the_fix(kernel, changes, reason):
    with pytest.raises(UnsupportedModelError, match=f"attention_kernel={kernel}: .*{reason}"):
        choose_kernel(kernel, dataclasses.replace(H100, **changes))


def test_kernel_support_is_read_from_the_model():
    """Width 32 over 4 heads is 8 a head; gemma2 has heads of its own width 8, and a softcap."""
    cpu = torch.device("cpu")
    llama = kernel_support(tiny_model("llama", torch.float32).config, cpu, half=False)
    assert (llama.capability, llama.softcap, llama.widths) == (None, False, (8, 8))
    gemma = kernel_support(tiny_model("gemma2", torch.float32).config, cpu, half=True)
    assert (gemma.half, gemma.softcap, gemma.widths) == (True, True, (8, 8))


def flash_attention(query, key, value, query_ends, key_ends, scale, window) -> torch.Tensor:
    """What flash attention's documentation says, a sequence at a time; heads behind tokens.

    The last query of a sequence stands at its last key; `window` is how many keys before and
    behind itself a query sees, -1 for all.
    """
    left, right = window
    outputs = []
    ends = zip(pairwise(query_ends.tolist()), pairwise(key_ends.tolist()), strict=True)
    for (first, stop), (first_key, stop_key) in ends:
        keys, values = (
            t[first_key:stop_key].repeat_interleave(query.shape[1] // t.shape[1], dim=1)
            for t in (key, value)
        )
        scores = torch.einsum("qhd,khd->hqk", query[first:stop], keys) * scale
        n_queries, n_keys = scores.shape[1:]
        behind = torch.arange(n_keys - n_queries, n_keys)[:, None] - torch.arange(n_keys)
        hidden = torch.zeros_like(behind, dtype=torch.bool)
        if left >= 0:
            hidden |= behind > left
        if right >= 0:
            hidden |= behind < -right
        weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(outputs)


@pytest.fixture
def flash_attention_on_cpus():
    """Kernels for the operator of flash attention, which torch has for GPUs only.

    What is tested is what a row is made into, how it comes back, and torch's derivative of it.
    """

    def forward(*arguments, scale, window_size_left, window_size_right):
        query, key, value, q_ends, k_ends, max_q, max_k, dropout, causal, _ = arguments
        assert (max_q, max_k) == (q_ends.diff().max(), k_ends.diff().max())
        assert causal == (window_size_left == -1)
        assert dropout == window_size_right == 0
        window = window_size_left, window_size_right
        output = flash_attention(query, key, value, q_ends, k_ends, scale, window)
        none = query.new_empty(0)
        return output, none, torch.empty(2, dtype=torch.uint64), none, none

    def backward(slopes, query, key, value, _output, _sums, *rest, **options):
        def gradients() -> tuple[torch.Tensor, ...]:
            leaves = [t.detach().requires_grad_() for t in (query, key, value)]
            output = forward(*leaves, *rest[:6], False, **options)[0]
            return torch.autograd.grad(output, leaves, slopes)

        # In a thread of its own: in that of a backward pass torch records nothing.
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(gradients).result()

    with library._scoped_library("aten", "IMPL") as operators:
        operators.impl("_flash_attention_forward", forward, "CPU")
        operators.impl("_flash_attention_backward", backward, "CPU")
        yield


@pytest.mark.parametrize(
    ("window", "n_heads", "n_kv"), windows_by_heads([None, 1, 4, 200], [(4, 2), (3, 3), (6, 1)])
)
def test_a_row_is_handed_to_varlen_as_flash_attention_wants_it(
    window, n_heads, n_kv, flash_attention_on_cpus
):
    """Values and gradients in float64; a prompt's keys are those of all its answers."""
    layout = PackedLayout(SPANS, torch.device("cpu"))
    scores = Scores(scaling=0.3, window=window, softcap=None)
    inputs = heads(layout, n_heads, n_kv, torch.float64)
    found = with_gradients(varlen, layout, scores, inputs)
    wanted = with_gradients(by_segment, layout, scores, inputs)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "mistral", "phi3", "gpt-neox", "mixtral"])
def test_a_model_computes_the_same_with_varlen(name, flash_attention_on_cpus):
    """Loss, sums and gradients, through transformers' interface."""
    row, results = pack(odd_groups(1), 16, prompt_counts=True), []
    for kernel in ("sdpa", "varlen"):
        model = OrpoModel(tiny_model(name, torch.float64), "packed", None, kernel)
        output = model(Microbatch(row, torch.device("cpu")), LossScale(0.1, 0.1, orpo(1.0)))
        output.loss.backward()
        results.append([output.sums, *(p.grad for p in model.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("window", [None, 1, 4, 40, 200])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_queries_in_parts_see_what_they_see_at_once(window, softcap, monkeypatch):
    """Values and gradients, and no part has a mask of more than its queries and keys."""
    scores = Scores(scaling=0.3, window=window, softcap=softcap)
    answers, sizes = [], []
    for n_queries in (1000, 16):
        monkeypatch.setattr(interface, "_QUERIES", n_queries)
        layout = PackedLayout(SPANS, torch.device("cpu"))
        *qkv, slopes = heads(layout, 4, 2, torch.float64)
        qkv = [t.requires_grad_() for t in qkv]
        output = by_segment(*qkv, layout, scores)
        output.backward(slopes)
        answers.append([output.detach(), *(t.grad for t in qkv)])
        sizes.append(max(mask.numel() for mask in layout._masks.values()))
    tolerance = 1e-12 if softcap is None else 1e-6
    for whole, parts in zip(*answers, strict=True):
        torch.testing.assert_close(parts, whole, rtol=tolerance, atol=tolerance)
    longest = 300 + 130
    assert sizes[1] <= 16 * min(longest, 16 + (window or longest)) < sizes[0]


@eager_flex
@pytest.mark.usefixtures("traced_again")
@pytest.mark.parametrize(
    ("window", "n_heads", "n_kv"), windows_by_heads([None, 4, 200], [(4, 2), (3, 3), (6, 1)])
)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_flex_equals_attention_by_segment(window, n_heads, n_kv, softcap):
    """In float64; a softcap's softmax is in fp32. Torch has no gradients for it on CPUs."""
    layout = PackedLayout(SPANS, torch.device("cpu"))
    scores = Scores(scaling=0.3, window=window, softcap=softcap)
    *qkv, _ = heads(layout, n_heads, n_kv, torch.float64)
    tolerance = 1e-12 if softcap is None else 1e-6
    found, expected = flex(*qkv, layout, scores), by_segment(*qkv, layout, scores)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("window", [None, 1, 130, 300])
def test_blocks_of_the_mask_are_those_that_are_seen(window):
    """Against torch's own, which looks at every token; a compiled kernel skips by it."""
    spans = (GroupSpan(40, (300, 280)), *SPANS, GroupSpan(520, (130, 400, 7)))
    layout = PackedLayout(spans, torch.device("cpu"))
    mask = packed_block_mask(layout, window)
    dense = create_block_mask(
        mask.mask_mod, None, None, layout.n_tokens, layout.n_tokens, device="cpu"
    )
    assert torch.equal(mask.to_dense(), dense.to_dense())
    n_blocks = -(-layout.n_tokens // 128)
    whole = torch.zeros(n_blocks, n_blocks, dtype=torch.bool)
    for row, count in enumerate(dense.full_kv_num_blocks[0, 0].tolist()):
        whole[row, dense.full_kv_indices[0, 0, row, :count].long()] = True
    _, every = seen_blocks(layout, window)
    # Not all of them: where two answers meet in a block it is seen in part, to be sure.
    assert not (torch.from_numpy(every) & ~whole).any()
    assert every.any() == whole.any()


@eager_flex
@pytest.mark.usefixtures("traced_again")
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral"])
def test_a_model_computes_the_same_with_flex(name):
    """Through transformers' interface; the mask is built once a window for all layers."""
    row = pack(odd_groups(1), 16, prompt_counts=True)
    outputs, windows = {}, {}
    for kernel in ("sdpa", "flex"):
        model = OrpoModel(tiny_model(name, torch.float32), "packed", None, kernel)
        assert model.attention_text == f"packed ({kernel})"
        batch = Microbatch(row, torch.device("cpu"))
        with torch.no_grad():
            outputs[kernel] = model(batch, LossScale(0.1, 0.1, orpo(1.0)))
        windows[kernel] = set(batch.layout.block_masks)
    torch.testing.assert_close(outputs["flex"].sums, outputs["sdpa"].sums, rtol=1e-5, atol=1e-5)
    seen = {"llama": {None}, "mistral": {8}, "gemma2": {None, 8}}[name]
    assert windows == {"sdpa": set(), "flex": seen}


@eager_flex
@pytest.mark.usefixtures("traced_again")
@pytest.mark.parametrize("kernel", ["varlen", "flex"])
@pytest.mark.usefixtures("flash_attention_on_cpus")
def test_a_compiled_layer_is_traced_once_for_rows_of_any_length(kernel):
    """What a row is made into is made before the layers, which would trace it for each row."""
    model = OrpoModel(tiny_model("llama", torch.float32), "packed", None, kernel)
    groups, traced = odd_groups(1), []
    layer = model.causal_lm.base_model.layers[0]
    layer.compile(backend=lambda graph, inputs: traced.append(graph) or graph, dynamic=True)
    with torch.no_grad():
        # From two blocks of the mask on: torch takes a size of one for a constant.
        for n_groups in (16, 19, 24):
            row = pack((groups * 3)[:n_groups], 16, prompt_counts=True)
            model(Microbatch(row, torch.device("cpu")), LossScale(0.1, 0.1, orpo(1.0)))
    assert len(traced) == 1


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_on_cpus_half_precision_is_attended_in_fp32(dtype, window):
    """Short segments; those of a thousand tokens stay in their dtype, near to fp32."""
    for spans, is_exact in ((SPANS, True), ((GroupSpan(1_100, (3, 1_050)),), False)):
        layout = PackedLayout(spans, torch.device("cpu"))
        scores = Scores(scaling=0.3, window=window, softcap=None)
        inputs = heads(layout, 4, 2, dtype)
        found = with_gradients(by_segment, layout, scores, inputs)
        wanted = with_gradients(by_segment, layout, scores, [t.float() for t in inputs])
        assert {t.dtype for t in found} == {dtype}
        assert torch.equal(found[0], wanted[0].to(dtype)) == is_exact
        for one, other in zip(found, wanted, strict=True):
            largest = other.abs().max().item()
            torch.testing.assert_close(one.float(), other, rtol=2e-2, atol=2e-2 * largest)


@pytest.mark.needs_gpu
@pytest.mark.usefixtures("traced_again")
@pytest.mark.parametrize("kernel", [varlen, flex], ids=lambda kernel: kernel.__name__)
@pytest.mark.parametrize("window", [None, 4, 200])
@pytest.mark.parametrize(("n_heads", "n_kv"), [(4, 2), (3, 3)])
def test_gpu_kernels_equal_attention_by_segment(kernel, window, n_heads, n_kv):
    """Value and gradients in bfloat16, against fp32 of the same numbers: two digits and a half."""
    layout = PackedLayout(SPANS, torch.device("cuda"))
    scores = Scores(scaling=0.3, window=window, softcap=None)
    inputs = heads(layout, n_heads, n_kv, torch.bfloat16)
    wanted = with_gradients(by_segment, layout, scores, [t.float() for t in inputs])
    for found, expected in zip(with_gradients(kernel, layout, scores, inputs), wanted, strict=True):
        largest = expected.abs().max().item()
        torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2 * largest)


@pytest.mark.needs_gpu
@pytest.mark.usefixtures("traced_again")
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 200])
def test_flex_on_a_gpu_equals_attention_by_segment_in_fp32(window, softcap):
    """Rows of several lengths, as microbatches are: the kernel is compiled for all of them."""
    for n_groups in range(1, len(SPANS) + 1):
        layout = PackedLayout(SPANS[:n_groups], torch.device("cuda"))
        scores = Scores(scaling=0.3, window=window, softcap=softcap)
        inputs = heads(layout, 4, 2, torch.float32)
        for found, expected in zip(
            with_gradients(flex, layout, scores, inputs),
            with_gradients(by_segment, layout, scores, inputs),
            strict=True,
        ):
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
