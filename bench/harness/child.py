"""Runs one case of a scenario in an interpreter of its own.

    python -m bench.harness.child SCENARIO OUT < CASE

``CASE`` is the case as JSON; its figures are written to ``OUT``. For the runner.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TextIO

from bench.harness.machine import ALLOCATOR, ROOT
from bench.harness.registry import scenario
from bench.harness.suite import Case


class CaseFailed(RuntimeError):
    """A case ended without figures."""


def run_apart(name: str, case: Case, log: TextIO) -> dict:
    """Run a case in a fresh interpreter.

    Parameters
    ----------
    name : str
        Scenario.
    case : Case
    log : file
        Takes what the case prints.
    """
    environment = {**ALLOCATOR, "VLLM_LOGGING_LEVEL": "WARNING"} | os.environ
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "figures.json"
        # A session of its own: what it leaves behind can be ended, and nothing else.
        child = subprocess.Popen(
            [sys.executable, "-m", "bench.harness.child", name, str(out)],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        try:
            child.communicate(json.dumps({"key": case.key, "parameters": case.parameters}))
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGTERM if child.poll() is None else signal.SIGKILL)
            child.wait()
        if child.returncode or not out.exists():
            raise CaseFailed(f"exit code {child.returncode}; see {Path(log.name).name}")
        return json.loads(out.read_text())


def main() -> None:
    """Run the case that is on the standard input."""
    name, out = sys.argv[1:]
    case = Case(**json.loads(sys.stdin.read()))
    figures = scenario(name).run(case)
    Path(out).write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
