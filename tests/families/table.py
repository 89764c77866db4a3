"""The table of `docs/families.md`: `python -m tests.families.table` writes its findings into it."""

import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from orpo_ray.models.mixers import MIXED, find_mixers
from orpo_ray.models.packing_check import examine
from orpo_ray.models.small_copy import decoder_layers, small_copy
from orpo_ray.preference.groups import PromptGroup, RowId
from orpo_ray.pretrained import UnsupportedModelError
from tests.families.exactness import ours, plain
from tests.families.tiny import VOCABULARY
from tests.families.training import tiny_family

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "families.md"
HEADER = "| family | rows | why |\n|---|---|---|\n"
FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
EXACT = 1e-5
_SHAPES = ((20, 30, 5), (5, 17, 33), (1, 7, 20), (17, 3, 29), (24, 1, 24))


@dataclass(frozen=True)
class Row:
    """What is found of a family: how its rows are computed, or `refused`, or `not tried`."""

    rows: str
    why: str

    def text(self, family: str) -> str:
        """Its line of the table."""
        return f"| `{family}` | {self.rows} | {self.why} |\n".replace("|  |", "| |")


def groups() -> list[PromptGroup]:
    """Pairs longer than every window and chunk of the tiny models."""
    rng = np.random.default_rng(1)

    def ids(length: int) -> np.ndarray:
        return rng.integers(12, VOCABULARY * 3 // 4, length).astype(np.int32)

    return [
        PromptGroup(ids(prompt), (ids(one), ids(two)), ((0, 1),), (RowId(0, index),))
        for index, (prompt, one, two) in enumerate(_SHAPES)
    ]


def find(family: str) -> tuple[Row, float, float]:
    """Judge a family; gives how far loss and gradient are from transformers' own unpadded rows.

    Returns:
        The row of the table; the difference; and that of transformers' own padded rows.
    """
    try:
        model = tiny_family(family)
    except UnsupportedModelError as error:
        return Row("refused", _line(error)), 0.0, 0.0
    except Exception as error:  # whatever transformers says of a config or a missing package
        return Row("not tried", _line(error)), 0.0, 0.0
    try:
        small = small_copy(model, torch.device("cpu"))
        verdict = examine(model if small is None else small, torch.device("cpu"))
    except UnsupportedModelError as error:
        return Row("refused", _line(error)), 0.0, 0.0
    is_mixed = verdict.path == "packed" and any(map(find_mixers, decoder_layers(model)))
    # How much is rounding's, and a release of torch's.
    row = Row(verdict.path, re.sub(r" \(by [^)]*\)", "", verdict.reason or MIXED * is_mixed))
    differences = (0.0, 0.0)
    for dtype in (torch.float64, torch.float32):
        model.to(dtype).set_attn_implementation("eager")
        try:
            alone, padded = (plain(model, groups(), padded) for padded in (False, True))
            own = ours(model, groups(), verdict)
        except RuntimeError:
            if dtype == torch.float32:
                raise
            continue  # not written for double precision
        differences = (alone.difference(own), alone.difference(padded))
        if differences[0] <= EXACT:
            break
    return row, *differences


def _line(error: Exception) -> str:
    text = " ".join(str(error).split()).removeprefix("model_name_or_path: ").partition(". ")[0]
    return text[:160].strip().replace("|", "/")


def stored() -> dict[str, Row]:
    """The table as it stands in the page."""
    lines = PAGE.read_text(encoding="utf-8").partition(HEADER)[2].splitlines()
    cells = ([cell.strip() for cell in line.split("|")] for line in lines)
    return {family.strip("`"): Row(rows, why) for _, family, rows, why, _ in cells}


def main(families: tuple[str, ...]) -> None:
    """Judge families, and write the page with them."""
    torch.set_num_threads(1)
    rows = stored()
    before = PAGE.read_text(encoding="utf-8").partition(HEADER)[0]
    for family in families:
        rows[family], difference, padded = find(family)
        print(family, rows[family], f"{difference:.1e} {padded:.1e}", flush=True)
        lines = [rows[family].text(family) for family in FAMILIES if family in rows]
        PAGE.write_text(before + HEADER + "".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(tuple(sys.argv[1:]) or FAMILIES)
