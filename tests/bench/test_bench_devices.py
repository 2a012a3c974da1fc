"""What a suite on a GPU records and shows, with a device of the same kind that needs none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bench_cases import DISTILLATION_CASE, OURS, QUICK, TINY, Copying, made

from introkernels import cli
from introkernels.bench import environment, records, runner, tables
from introkernels.bench.contenders import EAGER
from introkernels.bench.model import Case, Suite
from introkernels.bench.runner import Settings, run_suite
from introkernels.bench.suites import GPU

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The records of a case on the copying device."""
    made.clear()
    monkeypatch.setitem(runner.DEVICES, "copying", Copying)
    settings = Settings(threads=1, budget=0.05, read_bytes=QUICK.read_bytes)
    suite = Suite("tiny", (DISTILLATION_CASE,), (EAGER, OURS), device="copying")
    (records_of_case,) = run_suite(suite, suite.cases, settings)
    return records_of_case


def test_bandwidth_is_compared_with_a_copy(found: list[dict[str, Any]]) -> None:
    by_name = {record["contender"]: record for record in found}
    assert set(by_name) == {"eager", "ours", "sum", "copy"}
    copy = by_name["copy"]
    assert copy["role"] == "read"
    assert copy["bytes"] == 2 * QUICK.read_bytes
    best = copy["bytes"] / copy["seconds"]["best"]
    for record in found:
        records.check(record)
        share = 100 * record["bytes"] / record["seconds"]["median"] / best
        assert record["percent_of_copy"] == pytest.approx(share)
        assert record["percent_of_read"] is None


def test_clock_and_memory_are_those_of_the_device(found: list[dict[str, Any]]) -> None:
    (device,) = made
    assert device.closed
    least = sum(record["seconds"]["samples"] * record["seconds"]["calls"] for record in found)
    assert device.timed >= least
    for record in found:
        if record["role"] != "read":
            assert record["memory"]["added"] == 1000


def test_the_table_names_gpu_triton_and_copy(found: list[dict[str, Any]]) -> None:
    machine = found[0]["machine"] | {"gpu": {"name": "NVIDIA Example"}}
    versions = found[0]["versions"] | {"triton": "3.6.0"}
    text = tables.markdown(
        [record | {"machine": machine, "versions": versions} for record in found], "gpu.jsonl"
    )
    assert "NVIDIA Example, plain copy up to " in text
    assert "triton 3.6.0, introkernels " in text
    assert " ours of copy |" in text
    assert " of read |" not in text


def test_results_are_named_for_the_gpu() -> None:
    machine = {"cpu": "AMD EPYC", "cores": 16, "gpu": {"name": "NVIDIA H200"}}
    assert environment.slug(machine) == "nvidia-h200"


def test_files_from_before_there_were_copies_are_read(
    found: list[dict[str, Any]], tmp_path: Path
) -> None:
    path = tmp_path / "old.jsonl"
    old = [{k: v for k, v in record.items() if k != "percent_of_copy"} for record in found]
    path.write_text("".join(f"{json.dumps(record)}\n" for record in old))
    assert {record["percent_of_copy"] for record in records.read(path)} == {None}


def test_the_gpu_suite_needs_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "--suite", "gpu", "--out", str(tmp_path / "gpu.jsonl")]) == 2
    message = capsys.readouterr().err
    assert "--suite gpu measures on a GPU, and torch" in message
    assert "sees none" in message
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("case", TINY, ids=lambda case: case.operator.name)
def test_inputs_are_drawn_where_they_are_needed(case: Case) -> None:
    """Not made elsewhere first; "meta" stands for the GPU and takes any generator."""
    with torch.device("meta"):
        tensors = case.operator.draw(case.sizes, torch.float32, torch.Generator())
    assert all(tensor.is_meta for tensor in tensors.values())


def test_shapes_that_kernels_are_judged_by_are_measured() -> None:
    shapes = {(case.operator.name, case.shape, case.dtype) for case in GPU.cases}
    assert {
        ("introspective", (256, 100, 3072), "bfloat16"),
        ("introspective", (256, 100, 3072), "float32"),
        ("introspective", (128, 16, 150528), "bfloat16"),
        ("distillation", (8192, 32000), "bfloat16"),
    } <= shapes
