"""Records made up for tests of what is made from them."""

from __future__ import annotations

from typing import Any

from introkernels.bench.records import FIELDS, FORMAT, check

REVISION = "0123456789abcdef0123456789abcdef01234567"


def record(contender: str, median: float | None, role: str = "other", **fields: Any) -> Any:
    """A record of a distillation case, or of what ``fields`` make of it."""
    sizes = fields.pop("sizes", {"B": 8, "C": 10})
    shape = "x".join(map(str, sizes.values()))
    operator, dtype = fields.get("operator", "distillation"), fields.get("dtype", "float32")
    times = None
    if median is not None:
        quartiles = {"lower_quartile": median, "upper_quartile": median}
        times = {"median": median, **quartiles, "best": median, "samples": 9, "calls": 1}
    made = dict.fromkeys(FIELDS) | {
        "format": FORMAT,
        "run": "2020-01-01T00:00:00+00:00",
        "suite": "cpu",
        "case": f"{operator}/{shape}/{dtype}",
        "about": "a case",
        "operator": operator,
        "sizes": sizes,
        "dtype": dtype,
        "backward": True,
        "input_sets": 2,
        "contender": contender,
        "role": role,
        "status": "unavailable" if median is None else "timed",
        "reason": "not built" if median is None else None,
        "seconds": times,
        "bytes": 1000,
        "gigabytes_per_second": None if median is None else 1e-6 / median,
        "machine": {"cpu": "Some CPU", "cores": 2, "load": 0.0},
        "versions": {"torch": "2.13.0", "introkernels": "0.1.0"},
        "commit": {"revision": REVISION, "changed": False},
        "settings": {"threads": 1},
        **fields,
    }
    check(made)
    return made
