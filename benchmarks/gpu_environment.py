"""What a GPU check runs on: machine, versions, tools; fails where there are not all kernels."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import introkernels as ik
from introkernels import checkout
from introkernels.bench import environment

TOOLS = (
    ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm", "--format=csv"),
    ("nvcc", "--version"),
    ("c++", "--version"),
)


def main(out: Path) -> int:
    """Print all, write it to ``environment.json`` in ``out``; 1 without a GPU or its backends."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = {
        "machine": environment.machine(device),
        "versions": environment.versions(gpu=True),
        "commit": checkout.commit(),
        "build": ik.build_info(),
        "backends": ik.backends.status(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "tools": {tool[0]: answer(tool) for tool in TOOLS},
    }
    text = json.dumps(found, indent=2, ensure_ascii=False)
    (out / "environment.json").write_text(f"{text}\n", encoding="utf-8")
    print(text)
    if not found["gpus"]:
        print(f"torch {torch.__version__} sees no GPU")
        return 1
    missing = {name: state for name, state in found["backends"].items() if state != "loaded"}
    for name, state in missing.items():
        print(f"kernels of {name}: {state}")
    return 1 if missing else 0


def answer(command: tuple[str, ...]) -> str | None:
    """What a tool prints, or None where it is not installed."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{type(error).__name__}: {error}"
    return (done.stdout + done.stderr).strip()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
