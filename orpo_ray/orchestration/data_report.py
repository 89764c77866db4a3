"""What a run directory says of its data: counts, and every refused row; on the driver."""

import json
from collections.abc import Mapping
from pathlib import Path

from orpo_ray.preference.shards import TokenSet

REPORT_NAME = "data_report.json"
QUARANTINE = "quarantine"


def write_data_report(run_directory: str, token_sets: Mapping[str, TokenSet]) -> None:
    """Write `data_report.json` and `quarantine/<name>.jsonl` for every data set.

    Args:
        run_directory: must exist.
        token_sets: by name, such as `train` and `eval`.

    Raises:
        AssertionError: when rows are neither kept nor refused, which would be a bug.
    """
    run = Path(run_directory)
    report = {}
    for name, tokens in token_sets.items():
        counts = {key: value for key, value in tokens.report.items() if key != "quarantine"}
        for part in (counts, *counts["sources"].values()):
            if part["rows_read"] != part["rows_kept"] + part["rows_refused"]:
                raise AssertionError(f"{name}: {part} does not add up")
        report[name] = counts
        listed = run / QUARANTINE / f"{name}.jsonl"
        listed.unlink(missing_ok=True)
        if tokens.report["quarantine"]:
            listed.parent.mkdir(exist_ok=True)
            with listed.open("w", encoding="utf-8") as file:
                for source in tokens.report["quarantine"]:
                    file.write(Path(tokens.directory, source).read_text(encoding="utf-8"))
    (run / REPORT_NAME).write_text(json.dumps(report, indent=1) + "\n")
