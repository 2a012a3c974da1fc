"""A study's tables as CSV: numbers for programs, with the columns always in the same places."""

from __future__ import annotations

import json
from typing import Any

import pandas as pd

from introkernels.train.findings import MISSING
from introkernels.train.study.analysis import COLUMNS, Results
from introkernels.train.summary import REFERENCES


def results_csv(results: Results, cells: list[int | None]) -> str:
    """A row for each cell and method; fractions, and NLL in nats. Holds no times."""
    rows = []
    for cell in cells:
        for row in results.table(cell):
            entry: dict[str, Any] = {
                "cell": results.place_name(cell),
                "synthetic": results.study["synthetic"],
                "method": row.method,
                "group": row.group,
                "planned": row.planned,
                "finished": row.finished,
                "diverged": row.diverged,
            }
            for name in COLUMNS:
                entry |= {f"{name}_mean": row.mean[name], f"{name}_std": row.std[name]}
            for reference in REFERENCES:
                versus = row.versus.get(reference)
                entry |= {
                    f"minus_{reference}_mean": versus and versus.mean,
                    f"minus_{reference}_low": versus and versus.low,
                    f"minus_{reference}_high": versus and versus.high,
                    f"minus_{reference}_pairs": versus and len(versus.by_seed),
                }
            if cell is not None:
                entry |= {
                    "settings": row.settings and json.dumps(row.settings),
                    "hash": row.hash,
                }
            else:
                every = [results.chosen(row.method, c) for c in range(len(results.cells))]
                entry["hashes"] = " ".join(one["hash"] if one else MISSING for one in every)
            rows.append(entry)
    frame = pd.DataFrame(rows)
    counts = [name for name in frame if str(name).endswith("_pairs")]
    csv: str = frame.astype(dict.fromkeys(counts, "Int64")).to_csv(index=False)
    return csv


def runs_csv(results: Results) -> str:
    """A row for each run, diverged ones included. Holds no times."""
    csv: str = results.runs.drop(columns="cell_index").to_csv(index=False)
    return csv
