"""Memory of this process, bytes: on a CUDA card what torch has allocated, else what the system says of the process."""

from __future__ import annotations

import os
from pathlib import Path


def now(kind: str) -> int:
    if kind == "cuda":
        import torch

        return torch.cuda.memory_allocated()
    return _status("VmRSS")


def forget_peak(kind: str) -> None:
    """Count the peak from here on: making a model may take more than what is measured."""
    if kind == "cuda":
        import torch

        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def peak(kind: str) -> int:
    if kind == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))
