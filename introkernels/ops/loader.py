"""Which compiled libraries are loaded, and why the others are not."""

from __future__ import annotations

import json
from pathlib import Path

import torch

_PACKAGE = Path(__file__).resolve().parent.parent

LOADED = "loaded"


def _build_report() -> dict[str, str]:
    """What the build said of each library; empty where the package was never built."""
    try:
        report = json.loads((_PACKAGE / "_build_status.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): str(text) for name, text in report.items()}


def _load_cpu() -> str:
    path = _PACKAGE / "_cpu.so"
    if not path.exists():
        reason = _build_report().get("cpu", "the package was installed without building it")
        return f"{path.name} was built but is gone" if reason == "built" else f"not built: {reason}"
    try:
        torch.ops.load_library(path)
    except (OSError, RuntimeError) as error:
        return f"{path.name} was built but can't be loaded: {error.__cause__ or error}"
    return LOADED


STATUS: dict[str, str] = {
    "cpu": _load_cpu(),
    "cuda": "not available: this version has no CUDA kernels",
    "triton": "not available: this version has no Triton kernels",
}
