"""What a model computes between its last hidden states and its logits; in training workers.

The chunked head applies one matrix, a factor and a cap. Whether that is the model's own head is not
read from names in its config: the model's logits are compared with it on a few tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from orpo_ray.pretrained import UnsupportedModelError

_N_ROWS, _N_TOKENS = 2, 16
# The largest difference in units of the largest logit: rounding only.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
_ROUGH = 3e-2  # bfloat16 and float16
_LARGEST_LOGIT = 40.0


@dataclass(frozen=True)
class LMHead:
    """How logits are computed: `scale * (weight @ hidden + bias)`, soft-capped.

    Args:
        scale: factor of the logits.
        softcap: logit soft-capping, after the factor; None: no capping.
        has_layers: whether the model has further layers between its decoder and the head's matrix
            (a dense layer, a norm, a factor of the hidden states), which are run as they are.
    """

    scale: float = 1.0
    softcap: float | None = None
    has_layers: bool = False

    def logits(self, hidden: Tensor, matrix: nn.Module) -> Tensor:
        """All logits, for comparisons."""
        bias = getattr(matrix, "bias", None)
        logits = functional.linear(hidden, matrix.weight, bias)  # type: ignore[arg-type]
        return self.shaped(logits.to(torch.promote_types(logits.dtype, torch.float32)))

    def shaped(self, logits: Tensor) -> Tensor:
        """Apply factor and cap."""
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


@contextmanager
def instead(matrix: nn.Module, answer: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Replace the head's product, while it lasts; gives the hidden states that reach it."""
    seen: list[Tensor] = []

    def forward(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
        seen.append(hidden)
        return answer(hidden)

    matrix.forward = forward
    try:
        yield seen
    finally:
        del matrix.forward


def no_logits(hidden: Tensor) -> Tensor:
    """Logits of one token of the vocabulary, where only the hidden states are wanted."""
    return hidden.new_zeros(*hidden.shape[:-1], 1)


def last_hidden_states(
    causal_lm: PreTrainedModel, has_layers: bool, inputs: dict[str, Any]
) -> tuple[Tensor, Any]:
    """The hidden states that the head's matrix is applied to, and the model's whole output."""
    if not has_layers:
        result = causal_lm.base_model(**inputs)
        return result.last_hidden_state, result
    with instead(causal_lm.get_output_embeddings(), no_logits) as seen:
        result = causal_lm(**inputs)
    return seen[0], result


@torch.no_grad()
def find_head(causal_lm: PreTrainedModel, device: torch.device) -> LMHead:
    """Compare the model's own logits with the chunked head's; gives what makes them equal.

    Args:
        causal_lm: with the weights of its root at hand, and in evaluation mode; attention
            takes rows without padding.
        device: of its inputs.

    Raises:
        UnsupportedModelError: where no factor and cap do, and for a model that is not causal.
    """
    with refusing(causal_lm):
        return _Probe(causal_lm, device).find()


@contextmanager
def refusing(causal_lm: PreTrainedModel) -> Iterator[None]:
    """Turn errors of a model's forward pass into a refusal in one line."""
    family = causal_lm.config.model_type
    try:
        yield
    except UnsupportedModelError as error:
        text = str(error).removeprefix(f"model_name_or_path: {family}: ")
        raise UnsupportedModelError(f"model_name_or_path: {family}: {text}") from None
    except torch.OutOfMemoryError:
        raise
    except (
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
        LookupError,
        AssertionError,
    ) as error:
        said = " ".join(str(error).split())[:200]
        raise UnsupportedModelError(
            f"model_name_or_path: {family}: it does not compute logits from token ids alone: "
            f"{type(error).__name__}: {said}"
        ) from error


def probe_ids(causal_lm: PreTrainedModel, shape: tuple[int, ...], seed: int) -> Tensor:
    """Random tokens, on the host: not the first ids, which are special, nor the last ones.

    Those of images and sounds are last.
    """
    rows = getattr(causal_lm.get_input_embeddings(), "num_embeddings", 1 << 30)
    n_tokens = min(rows, causal_lm.config.get_text_config().vocab_size)
    low, high = n_tokens // 8, max(n_tokens // 8 + 1, n_tokens * 3 // 4)
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def confirms(causal_lm: PreTrainedModel, head: LMHead, device: torch.device) -> bool:
    """Whether a model's logits are those of a head that was found in a copy of it."""
    with refusing(causal_lm):
        return _Probe(causal_lm, device).confirms(head)


class _Probe:
    """A few random tokens and what the model makes of them."""

    def __init__(self, causal_lm: PreTrainedModel, device: torch.device) -> None:
        self.causal_lm = causal_lm
        self.matrix = causal_lm.get_output_embeddings()
        shape = (_N_ROWS, _N_TOKENS)
        self.ids, self.other = (probe_ids(causal_lm, shape, seed).to(device) for seed in (0, 1))

    def find(self) -> LMHead:
        """See `find_head`."""
        if not isinstance(getattr(self.matrix, "weight", None), Tensor):
            raise UnsupportedModelError("it has no head of one matrix that gives its logits")
        own = self._own(self.ids)
        if not own.isfinite().all():
            raise UnsupportedModelError("its logits are not finite")
        self._check_causal(own)
        hidden = self._hidden()
        scale, softcap = self._found(self._answers())
        has_layers = not self._is_last(hidden)
        head = LMHead(scale, softcap, has_layers)
        found = head.logits(hidden.to(self.matrix.weight.dtype), self.matrix)
        if not _close(found, own.to(found.dtype), own.dtype):
            raise UnsupportedModelError("its logits are not those of its last hidden states")
        if has_layers and not torch.equal(self._captured(), hidden):
            raise UnsupportedModelError("its hidden states before the head differ by its logits")
        return head

    def confirms(self, head: LMHead) -> bool:
        """See `confirms`."""
        with instead(self.matrix, self.matrix.forward) as seen:
            own = self._own(self.ids)
        found = head.logits(seen[0], self.matrix)
        last = last_hidden_states(self.causal_lm, head.has_layers, self._inputs)[0]
        same_states = last.shape == seen[0].shape and _close(last, seen[0], last.dtype)
        return same_states and _close(found, own, own.dtype)

    def _own(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.causal_lm(input_ids=ids, use_cache=False).logits
        if logits.shape != (*ids.shape, self.matrix.weight.shape[0]):
            raise UnsupportedModelError(
                f"its logits are {tuple(logits.shape)}, not one for each of "
                f"{self.matrix.weight.shape[0]} tokens at each of {tuple(ids.shape)} positions"
            )
        return logits

    def _check_causal(self, own: Tensor) -> None:
        """A position's logits may depend on no later token."""
        if not _close(self._own(self.ids), own, own.dtype):
            raise UnsupportedModelError("its logits are random: two passes differ")
        for first in (1, _N_TOKENS // 2, _N_TOKENS - 1):
            ids = torch.cat([self.ids[:, :first], self.other[:, first:]], dim=1)
            if not _close(self._own(ids)[:, :first], own[:, :first], own.dtype):
                raise UnsupportedModelError(
                    "it is not causal: its logits at a token depend on the tokens after it"
                )

    def _hidden(self) -> Tensor:
        """What reaches the head's matrix."""
        product = self.matrix.forward
        with instead(self.matrix, product) as seen:
            self._own(self.ids)
        if len(seen) != 1 or seen[0].shape[:-1] != self.ids.shape:
            shapes = ", ".join(str(tuple(part.shape)) for part in seen)
            raise UnsupportedModelError(
                f"its head is applied to {shapes or 'nothing'}, not once to a state for each token"
            )
        return seen[0]

    def _captured(self) -> Tensor:
        return last_hidden_states(self.causal_lm, True, self._inputs)[0]

    @property
    def _inputs(self) -> dict[str, Any]:
        return {"input_ids": self.ids, "use_cache": False}

    def _is_last(self, hidden: Tensor) -> bool:
        """Whether these are the hidden states that the decoder itself gives."""
        decoder = self.causal_lm.base_model
        if decoder is self.causal_lm:
            return False
        last = getattr(decoder(**self._inputs), "last_hidden_state", None)
        if not isinstance(last, Tensor) or last.shape != hidden.shape:
            return False
        return _close(last, hidden, hidden.dtype)

    def _answers(self) -> tuple[Tensor, Tensor]:
        """Numbers in place of the head's product, and the logits that the model makes of them."""
        n_tokens = self.matrix.weight.shape[0]
        spread = torch.linspace(-_LARGEST_LOGIT, _LARGEST_LOGIT, n_tokens, device=self.ids.device)
        given = spread.roll(n_tokens // 3).expand(*self.ids.shape, n_tokens).contiguous()
        with instead(self.matrix, lambda _: given.clone()):
            return given, self._own(self.ids).float()

    def _found(self, answers: tuple[Tensor, Tensor]) -> tuple[float, float | None]:
        """The factor and the cap by which logits differ from the head's product."""
        given, made = answers
        if torch.equal(given, made):
            return 1.0, None
        settings = self.causal_lm.config.get_text_config().to_dict()
        caps = {float(v) for k, v in settings.items() if "cap" in k and _is_number(v) and v > 0}
        for softcap in (None, *sorted(caps)):
            straight = made if softcap is None else softcap * torch.atanh(made / softcap)
            # Where the cap is far, and where rounding is small beside the number.
            limit = straight.abs().max() if softcap is None else softcap
            at = (straight.abs() <= limit) & (given.abs() > 0.1) & straight.isfinite()
            if not at.any():
                continue
            scale = _named((straight[at].double() / given[at].double()).median().item(), settings)
            if _close(LMHead(scale, softcap).shaped(given), made, torch.float32):
                return scale, softcap
        raise UnsupportedModelError("its logits are no multiple of the head's product, nor capped")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _named(scale: float, settings: dict[str, Any]) -> float:
    """The number of a config that a measured one is, or its reciprocal, without rounding."""
    if abs(scale - 1) < 1e-5:
        return 1.0
    numbers = [float(v) for v in settings.values() if _is_number(v) and v]
    named = [n for number in numbers for n in (number, 1 / number)]
    return next((n for n in named if abs(n / scale - 1) < 1e-5), scale)


def _close(one: Tensor, other: Tensor, dtype: torch.dtype) -> bool:
    tolerance = _TOLERANCE.get(dtype, _ROUGH)
    largest = max(other.abs().max().item(), 1e-30)
    return (one.double() - other.double()).abs().max().item() <= tolerance * largest
