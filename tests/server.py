"""A server as a user starts it: ``python serve.py`` in a process group of its own."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path

import httpx
import openai

ROOT = Path(__file__).parents[1]
START_SECONDS = 300
STOP_SECONDS = 120


def environment() -> dict[str, str]:
    """Environment of a user: without what the tests of in-process engines set in this one."""
    ours = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "VLLM_PLUGINS", "VLLM_API_KEY")
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    return {**kept, "VLLM_NO_USAGE_STATS": "1"}


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether a condition came true in time; it is tried at least once, and at the very end."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return condition()
        time.sleep(0.2)
    return True


class Server:
    """A running ``serve.py`` and its log, which holds standard output and error.

    Parameters
    ----------
    options : sequence of str
        Options of ``serve.py`` besides the port.
    log : Path
    api_key : str
        Given to the server and to its clients.
    port : int or None
        By default one that is free.
    """

    def __init__(
        self, options: Sequence[str], log: Path, api_key: str, port: int | None = None
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1] if port is None else port
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.api_key = api_key
        # No proxy of the environment: it may not know what 127.0.0.1 is here.
        self.http = httpx.Client(base_url=self.url, timeout=120, trust_env=False)
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "serve.py", "--port", str(self.port)),
                    *("--api-key", api_key, *options),
                ],
                cwd=ROOT,
                env=environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait_until_ready(self) -> None:
        """Wait for ``/health``; a server that died or takes too long is an error with its log."""

        def answered() -> bool:
            return self.process.poll() is not None or self.healthy()

        if not wait_until(answered, START_SECONDS) or self.process.poll() is not None:
            raise RuntimeError(
                f"serve.py did not start (exit code {self.process.poll()}):\n{self.tail()}"
            )

    def healthy(self) -> bool:
        try:
            return self.http.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def client(self, api_key: str | None = None) -> openai.OpenAI:
        """An OpenAI client, by default with the right key."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=api_key or self.api_key,
            max_retries=0,
            timeout=120,
            http_client=httpx.Client(trust_env=False),
        )

    def said(self) -> str:
        """The log so far."""
        return self.log.read_text(errors="replace")

    def tail(self, since: int = 0) -> str:
        """The end of the log, from a position on."""
        return self.said()[since:][-8000:]

    def example(self) -> tuple[str, dict[str, str], str]:
        """URL, headers and body of the ``curl`` command that the banner shows."""
        command = self.said().split("Try:\n\n")[1].split("\n\n")[0].replace("\\\n", " ")
        curl, url, *rest = shlex.split(command.replace("$VLLM_API_KEY", self.api_key))
        assert curl == "curl" and rest[:4:2] == ["-H", "-H"] and rest[4] == "-d"
        return url, dict(header.split(": ") for header in rest[1:4:2]), rest[5]

    def metrics(self) -> dict[str, float]:
        """Every metric of ``/metrics``, summed over its labels."""
        found: dict[str, float] = defaultdict(float)
        for name, value in re.findall(
            r"(?m)^(\w[\w:]*)(?:\{.*\})? (\S+)$", self.http.get("/metrics").text
        ):
            found[name] += float(value)
        return found

    @cached_property
    def blocks(self) -> int:
        """Blocks of the pool that requests can have: all but the null block."""
        (count,) = re.findall(r'num_gpu_blocks="(\d+)"', self.http.get("/metrics").text)
        return int(count) - 1

    def stop(self) -> int:
        """Ask the server to end as ``kill`` does, and wait for all of its processes.

        Returns
        -------
        int
            Exit code.

        Raises
        ------
        RuntimeError
            If some process had to be killed.
        """
        self.process.terminate()
        try:
            code = self.process.wait(STOP_SECONDS)
            if wait_until(lambda: not self._group_alive(), 20):
                return code
        except subprocess.TimeoutExpired:
            pass
        self.kill()
        raise RuntimeError(f"processes were left after SIGTERM:\n{self.tail()}")

    def kill(self) -> None:
        """End what is left of the process group."""
        self.http.close()
        if self._group_alive():
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(20)

    def _group_alive(self) -> bool:
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True
