"""Packing prompt groups into rows without padding, and balancing rows over ranks; on workers."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from orpo_ray.preference.groups import PromptGroup, RowId

Integers = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float32]
Range = tuple[int, int]


@dataclass(frozen=True)
class GroupSpan:
    """Number of tokens of the prompt and of each completion of one group in a packed row."""

    prompt: int
    completions: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        """Number of tokens of the whole group."""
        return self.prompt + sum(self.completions)


@dataclass(frozen=True)
class ChunkRanges:
    """One chunk of the LM head, of whole pairs: (start, stop) ranges in arrays of `PackedRow`."""

    positions: Range
    targets: Range
    completions: Range
    pairs: Range


@dataclass(frozen=True)
class PackedRow:
    """One microbatch: `[prompt | completion | completion ... | prompt | ...]`.

    Args:
        token_ids: (tokens,) groups end to end.
        position_ids: (tokens,) restart in every group; every completion continues its prompt.
        multiplicity: (tokens,) number of padded (prompt + answer) rows that would hold the token.
        spans: lengths of the groups, in order.
        positions: (positions,) positions that have a target, ordered by chunk.
        predicted_at: (targets,) where the target is predicted, an index into `positions`.
        target_ids: (targets,) the predicted token.
        nll_weights: (targets,) number of pairs whose NLL includes the target.
        completion: (targets,) index of the completion; the number of completions for prompt tokens.
        completion_lengths: (completions,) number of targets.
        chosen: (pairs,) index of the chosen completion.
        rejected: (pairs,) index of the rejected completion; the chosen one's without one.
        chunks: ranges that the LM head projects at once, but for pairs that are too long for it.
        chunk_tokens: maximum number of positions that it projects at once.
        row_ids: source row of every pair.
    """

    token_ids: Integers
    position_ids: Integers
    multiplicity: Floats
    spans: tuple[GroupSpan, ...]
    positions: Integers
    predicted_at: Integers
    target_ids: Integers
    nll_weights: Floats
    completion: Integers
    completion_lengths: Floats
    chosen: Integers
    rejected: Integers
    chunks: tuple[ChunkRanges, ...]
    chunk_tokens: int
    row_ids: tuple[RowId, ...]

    @property
    def n_nll_tokens(self) -> int:
        """Number of NLL tokens, each counted once for every pair that includes it."""
        return int(self.nll_weights.sum(dtype=np.float64))

    @property
    def n_pairs(self) -> int:
        """Number of pairs in this row."""
        return len(self.chosen)

    @property
    def compared(self) -> Integers:
        """Indices of the pairs that have a rejected completion."""
        return np.flatnonzero(self.chosen != self.rejected)


def nll_tokens(group: PromptGroup, prompt_counts: bool) -> int:
    """Compute `PackedRow.n_nll_tokens` of one group without packing it.

    Args:
        group: any group.
        prompt_counts: whether the NLL includes prompt tokens (`nll_scope: all`).
    """
    unpredicted = 0 if len(group.prompt) else 1
    answers = sum(len(group.completions[chosen]) - unpredicted for chosen, _ in group.pairs)
    prompt = max(len(group.prompt) - 1, 0) * len(group.pairs) if prompt_counts else 0
    return answers + prompt


def pack(groups: Sequence[PromptGroup], chunk_tokens: int, prompt_counts: bool) -> PackedRow:
    """Pack groups into one row.

    Without groups the row is one token without a target: a rank that gets no group of a small last
    batch still takes part in the collectives of the step.

    Args:
        groups: whole prompt groups.
        chunk_tokens: maximum number of positions in a chunk of the LM head; the completions of a
            longer group are one chunk.
        prompt_counts: whether the NLL includes prompt tokens (`nll_scope: all`).
    """
    builder = _RowBuilder(chunk_tokens, prompt_counts)
    for group in groups:
        builder.add(group)
    return builder.row()


class _RowBuilder:
    """Collects the arrays of a packed row, group by group."""

    def __init__(self, chunk_tokens: int, prompt_counts: bool) -> None:
        self._chunk_tokens = chunk_tokens
        self._prompt_counts = prompt_counts
        self._spans: list[GroupSpan] = []
        self._row_ids: list[RowId] = []
        self._columns: dict[str, list[npt.NDArray[np.generic]]] = {}
        self._sizes = dict.fromkeys(("tokens", "positions", "targets", "completions", "pairs"), 0)
        self._chunks: list[ChunkRanges] = []
        self._chunk_start = dict(self._sizes)

    def _put(self, size: str | None = None, /, **arrays: npt.ArrayLike) -> None:
        """Append to columns, and add their length to the counter `size`."""
        for name, array in arrays.items():
            values = np.asarray(array)
            self._columns.setdefault(name, []).append(values)
        if size:
            self._sizes[size] += len(values)

    def add(self, group: PromptGroup) -> None:
        """Append the tokens, targets and pairs of one group."""
        lengths = [len(completion) for completion in group.completions]
        n_prompt, n_pairs = len(group.prompt), len(group.pairs)
        start = self._sizes["tokens"]
        uses = np.bincount(np.ravel(group.pairs), minlength=len(lengths))
        self._put(multiplicity=np.full(n_prompt, 2 * n_pairs), position_ids=np.arange(n_prompt))
        self._put("tokens", token_ids=group.prompt)
        for completion, times in zip(group.completions, uses, strict=True):
            self._put(
                "tokens",
                token_ids=completion,
                multiplicity=np.full(len(completion), times),
                position_ids=np.arange(n_prompt, n_prompt + len(completion)),
            )
        if self._prompt_counts:
            self._add_prompt_targets(group, start)
        self._add_completion_targets(group, start)
        self._spans.append(GroupSpan(n_prompt, tuple(lengths)))
        self._row_ids.extend(group.row_ids)

    def _add_prompt_targets(self, group: PromptGroup, start: int) -> None:
        """Add targets inside the prompt; they belong to no pair, so any chunk may hold them."""
        done, n_targets = 0, len(group.prompt) - 1
        while done < n_targets:
            self._close_chunk_unless_room(1)
            room = self._chunk_tokens - self._in_chunk("positions")
            take = min(max(room, 1), n_targets - done)
            at = np.arange(done, done + take)
            self._put(
                target_ids=group.prompt[at + 1],
                nll_weights=np.full(take, len(group.pairs)),
                completion=np.full(take, -1),
            )
            self._put("targets", predicted_at=np.arange(take) + self._sizes["positions"])
            self._put("positions", positions=start + at)
            done += take

    def _add_completion_targets(self, group: PromptGroup, start: int) -> None:
        """Add targets of completions; the prompt's last position predicts the first of each."""
        has_prompt = len(group.prompt) > 0
        n_positions = has_prompt + sum(len(completion) - 1 for completion in group.completions)
        self._close_chunk_unless_room(n_positions)
        chosen_by = np.bincount([c for c, _ in group.pairs], minlength=len(group.completions))
        prompt_last = self._sizes["positions"]
        if has_prompt:
            self._put("positions", positions=[start + len(group.prompt) - 1])
        first_completion = self._sizes["completions"]
        token = start + len(group.prompt)
        for completion, times in zip(group.completions, chosen_by, strict=True):
            own = np.arange(len(completion) - 1)
            predicted_at = own + self._sizes["positions"]
            if has_prompt:
                predicted_at = np.concatenate([[prompt_last], predicted_at])
            n_targets = len(predicted_at)
            self._put(
                target_ids=completion[len(completion) - n_targets :],
                nll_weights=np.full(n_targets, times),
                completion=np.full(n_targets, self._sizes["completions"]),
            )
            self._put("targets", predicted_at=predicted_at)
            self._put("positions", positions=token + own)
            self._put("completions", completion_lengths=[n_targets])
            token += len(completion)
        chosen, rejected = np.asarray(group.pairs).T + first_completion
        self._put("pairs", chosen=chosen, rejected=rejected)

    def _in_chunk(self, size: str) -> int:
        return self._sizes[size] - self._chunk_start[size]

    def _close_chunk_unless_room(self, n_positions: int) -> None:
        """Start a new chunk if the open one has no room for `n_positions`."""
        filled = self._in_chunk("positions")
        if filled and filled + n_positions > self._chunk_tokens:
            self._close_chunk()

    def _close_chunk(self) -> None:
        ranges = {
            name: (self._chunk_start[name], self._sizes[name])
            for name in ("positions", "targets", "completions", "pairs")
        }
        self._chunks.append(ChunkRanges(**ranges))
        self._chunk_start = dict(self._sizes)

    def row(self) -> PackedRow:
        """Return the finished row."""
        if not self._spans:
            self._put("tokens", token_ids=[0], position_ids=[0], multiplicity=[0])
            self._spans.append(GroupSpan(1, ()))
        if self._in_chunk("targets"):
            self._close_chunk()
        completion = self._integers("completion")
        completion[completion < 0] = self._sizes["completions"]
        return PackedRow(
            token_ids=self._integers("token_ids"),
            position_ids=self._integers("position_ids"),
            multiplicity=self._floats("multiplicity"),
            spans=tuple(self._spans),
            positions=self._integers("positions"),
            predicted_at=self._integers("predicted_at"),
            target_ids=self._integers("target_ids"),
            nll_weights=self._floats("nll_weights"),
            completion=completion,
            completion_lengths=self._floats("completion_lengths"),
            chosen=self._integers("chosen"),
            rejected=self._integers("rejected"),
            chunks=tuple(self._chunks),
            chunk_tokens=self._chunk_tokens,
            row_ids=tuple(self._row_ids),
        )

    def _integers(self, name: str) -> Integers:
        parts = self._columns.get(name)
        return np.concatenate(parts).astype(np.int64) if parts else np.zeros(0, np.int64)

    def _floats(self, name: str) -> Floats:
        parts = self._columns.get(name)
        return np.concatenate(parts).astype(np.float32) if parts else np.zeros(0, np.float32)


def balanced_bins(
    n_tokens: Sequence[int], n_workers: int, budget_tokens: int
) -> list[list[list[int]]]:
    """Distribute the groups of a global batch over workers, the same number of bins each.

    Groups are put, longest first, into the emptiest bin (Graham 1969), with as few bins per worker
    as keep every bin within the budget. A group longer than the budget gets a bin of its own. The
    result depends on the arguments alone, so all workers agree on it without communication.

    Args:
        n_tokens: number of tokens of every group.
        n_workers: number of workers (the world size).
        budget_tokens: maximum number of tokens of a bin, which becomes a microbatch.

    Returns:
        `bins[worker][microbatch]`, each an ascending list of group indices; empty where there are
        fewer groups than bins.
    """
    for per_worker in _bin_counts(n_tokens, n_workers, budget_tokens):
        bins = _longest_first(n_tokens, n_workers * per_worker)
        if all(len(b) < 2 or sum(n_tokens[i] for i in b) <= budget_tokens for b in bins):
            break
    return [[sorted(b) for b in bins[worker::n_workers]] for worker in range(n_workers)]


def _bin_counts(n_tokens: Sequence[int], n_workers: int, budget_tokens: int) -> range:
    """Numbers of bins per worker to try, from the lower bound to one bin per group."""
    least = -(-sum(n_tokens) // (budget_tokens * n_workers))
    most = max(1, -(-len(n_tokens) // n_workers))
    return range(max(1, min(least, most)), most + 1)


def _longest_first(n_tokens: Sequence[int], n_bins: int) -> list[list[int]]:
    """Put every index, longest group first, into the bin with the fewest tokens so far."""
    bins: list[list[int]] = [[] for _ in range(n_bins)]
    loads = np.zeros(n_bins, dtype=np.int64)
    for index in sorted(range(len(n_tokens)), key=lambda i: (-n_tokens[i], i)):
        emptiest = int(loads.argmin())
        bins[emptiest].append(index)
        loads[emptiest] += n_tokens[index]
    return bins
