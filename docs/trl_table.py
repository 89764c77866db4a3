"""The table of TRL's names in `docs/trl.md`, from `orpo_ray.trl`: `python docs/trl_table.py`."""

import re
from pathlib import Path

from orpo_ray.config.schema import SECTION_OF
from orpo_ray.trl.names import Name, names

PAGE = Path(__file__).parent / "trl.md"
_MARKED = re.compile(r"(?<=^<!-- names: ).*?(?=^<!-- end of names -->)", re.DOTALL | re.M)
_VERDICTS = {"same": "the same", "no_effect": "no effect", "refused": "refused"}


def with_names(page: str) -> str:
    """Return the page with the table between its markers replaced by that of the package."""
    note = "generated from orpo_ray/trl/names.csv by docs/trl_table.py; run `make docs` -->"
    rows = ["| name | TRL's default | here | |", "|---|---|---|---|", *map(_row, names().values())]
    table = "\n".join(rows)
    return _MARKED.sub(lambda _: f"{note}\n\n{table}\n\n", page)


def _row(row: Name) -> str:
    here = _VERDICTS.get(row.verdict, f"`{row.becomes.rpartition('.')[2] or row.becomes}`")
    if row.verdict == "maps" and row.becomes.rpartition(".")[2] not in SECTION_OF:
        here = f"`{row.becomes}`" if row.becomes.endswith(")") else row.becomes
    cells = (f"`{row.name}`", f"`{row.default!r}`", here, row.remark)
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


if __name__ == "__main__":
    PAGE.write_text(with_names(PAGE.read_text()))
