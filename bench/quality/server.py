"""Servers that the evaluation starts itself: ``serve.py`` as a user would start it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx

SERVE = Path(__file__).parents[2] / "serve.py"
START_SECONDS = 600
STOP_SECONDS = 60


class ServerError(RuntimeError):
    """A server that did not start; the message has the end of its log."""


@contextmanager
def serving(model: str | None, options: Sequence[str], log: Path) -> Iterator[str]:
    """Run ``serve.py`` on a free port of this machine.

    Parameters
    ----------
    model : str or None
        A directory or a name; by default the bundled model.
    options : sequence of str
        More options of ``serve.py``.
    log : Path
        Gets what the server prints.

    Yields
    ------
    str
        Its URL, once it answers. The server ends with the context.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(SERVE), *([model] if model else [])]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [*command, "--port", str(port), *options],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=_environment(),
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait(process, url, log)
        yield url
    finally:
        process.terminate()
        try:
            with suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        finally:
            with suppress(ProcessLookupError):  # whatever is left of its processes
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _environment() -> dict[str, str]:
    """Ours, without an API key: nobody else is to be served."""
    # glibc keeps freed memory: fresh memory is slow on machines that give it back to a host.
    keep = {
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(16 << 30),
        "MALLOC_TOP_PAD_": str(64 << 20),
    }
    ours = {**keep, **os.environ, "VLLM_NO_USAGE_STATS": "1"}
    root = str(SERVE.parent)
    ours["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    ours.pop("VLLM_API_KEY", None)
    return ours


def _wait(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            if httpx.get(f"{url}/health", trust_env=False).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    tail = log.read_text(errors="replace")[-3000:]
    raise ServerError(f"serve.py did not start (exit code {process.poll()}):\n{tail}")
