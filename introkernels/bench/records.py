"""Results as JSON lines: one object for each case and contender, and nothing that is not data.

A file is a set of measurements by (case, threads): a later run replaces whole cases, never single
contenders, so that the contenders of a case always come from the same run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]

FORMAT = 1

_OPTIONAL = type(None)
_NUMBER = (int, float)

# What every record has, and of which type. Nested objects are described by their writers.
FIELDS: dict[str, tuple[type, ...]] = {
    "format": (int,),
    "run": (str,),
    "suite": (str,),
    "case": (str,),
    "about": (str,),
    "operator": (str,),
    "sizes": (dict,),
    "dtype": (str,),
    "backward": (bool,),
    "input_sets": (int,),
    "contender": (str,),
    "role": (str,),
    "status": (str,),
    "reason": (str, _OPTIONAL),
    "seconds": (dict, _OPTIONAL),
    "error": (dict, _OPTIONAL),
    "tolerance": (dict, _OPTIONAL),
    "bytes": (int,),
    "flops": (int, _OPTIONAL),
    "gigabytes_per_second": (*_NUMBER, _OPTIONAL),
    "percent_of_sum": (*_NUMBER, _OPTIONAL),
    "percent_of_read": (*_NUMBER, _OPTIONAL),
    "percent_of_copy": (*_NUMBER, _OPTIONAL),
    "memory": (dict, _OPTIONAL),
    "first_call": (dict, _OPTIONAL),
    "package": (str, _OPTIONAL),
    "made_equal": (str, _OPTIONAL),
    "machine": (dict,),
    "versions": (dict,),
    "commit": (dict, _OPTIONAL),
    "settings": (dict,),
}
# Fields that came later: older files lack them, which means None.
_LATER = ("percent_of_copy", "first_call", "package", "made_equal")
STATUSES = ("timed", "refused", "unavailable")


class ResultsError(ValueError):
    """A file of results can't be read; names the file, the line and what is wrong with it."""


def check(record: Record) -> None:
    """Raise ValueError for anything but a record of this format."""
    for name, types in FIELDS.items():
        if name not in record:
            if name in _LATER:
                continue
            raise ValueError(f"{name} is missing")
        # bool is an int to Python, but not to whoever reads the file.
        if not isinstance(record[name], types) or (
            isinstance(record[name], bool) and bool not in types
        ):
            raise ValueError(f"{name} is {record[name]!r}")
    if unknown := record.keys() - FIELDS.keys():
        raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
    if record["format"] != FORMAT:
        raise ValueError(f"format is {record['format']}, this version reads {FORMAT}")
    if record["status"] not in STATUSES:
        raise ValueError(f"status is {record['status']!r}, expected one of {', '.join(STATUSES)}")
    if (record["status"] == "timed") != (record["seconds"] is not None):
        raise ValueError("a contender has times if, and only if, it was timed")


def key(record: Record) -> tuple[str, int]:
    """What a run replaces as a whole: a case at a number of threads."""
    return record["case"], record["settings"]["threads"]


def read(path: Path) -> list[Record]:
    """All records of a file.

    Raises:
        ResultsError: there is no such file, or it holds something else.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path}: can't be read: {error}") from error
    records: list[Record] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if isinstance(record, dict):
                record = dict.fromkeys(_LATER) | record
            check(record)
        except (ValueError, TypeError, KeyError) as error:
            raise ResultsError(f"{path}, line {number}: not a result: {error}") from error
        records.append(record)
    runs: dict[tuple[str, int], str] = {}
    for record in records:
        if runs.setdefault(key(record), record["run"]) != record["run"]:
            raise ResultsError(f"{path}: {record['case']} comes from more than one run")
    return records


def merge(old: Iterable[Record], new: Sequence[Record]) -> list[Record]:
    """``old`` with the cases of ``new`` in the place of their earlier measurements."""
    fresh = {key(record) for record in new}
    merged: list[Record] = []
    placed: set[tuple[str, int]] = set()
    for record in old:
        if key(record) not in fresh:
            merged.append(record)
        elif key(record) not in placed:
            placed.add(key(record))
            merged += [candidate for candidate in new if key(candidate) == key(record)]
    return merged + [record for record in new if key(record) not in placed]


def write(path: Path, records: Iterable[Record]) -> None:
    """Write a file so that at any moment it is the old one or the new one.

    Numbers are kept to six digits.
    """
    lines = []
    for record in records:
        check(record)
        lines.append(json.dumps(_rounded(record), allow_nan=False, ensure_ascii=False))
    write_text(path, "".join(f"{line}\n" for line in lines))


def write_text(path: Path, text: str) -> None:
    """Replace the content of a file in one step.

    Raises:
        OSError: it can't be written, and is what it was; the error names it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        # A full disk is noticed by a write, which names no file.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value
