"""A server on this machine for ``vllm bench serve``, and what its metrics say meanwhile."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from bench.harness.contenders import Contender
from bench.harness.machine import ROOT

SERVED_NAME = "bench"
START_SECONDS = 300
POLL_SECONDS = 0.5


def command(side: Contender, model: str) -> list[str]:
    """Command of a contender's server: ``serve.py`` if it compresses, else vLLM's own."""
    if side.settings is None:
        return [sys.executable, "-m", "vllm_kvcompress.cli", "serve", model]
    options = [
        f"--kvcompress-{key.replace('_', '-')}={value}" for key, value in side.settings.items()
    ]
    return [sys.executable, "serve.py", model, *options]


@contextmanager
def serving(side: Contender, model: str, options: list[str]) -> Iterator[str]:
    """Start a server, wait until it is healthy, and stop it afterwards.

    Parameters
    ----------
    side : Contender
    model : str
    options : list of str
        Of ``vllm serve``.

    Yields
    ------
    str
        Its address.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*command(side, model), "--host=127.0.0.1", f"--port={port}"]
    words += [f"--served-model-name={SERVED_NAME}", "--disable-uvicorn-access-log", *options]
    server = subprocess.Popen(
        words, cwd=ROOT, env={**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    )
    url = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + START_SECONDS
        while not _answers(url):
            if server.poll() is not None or time.monotonic() > until:
                raise RuntimeError("the server did not start; its own words are in the log")
            time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(60)


def get(url: str, body: dict[str, Any] | None = None) -> str:
    """Text at an address, not by way of a proxy; what is there for a JSON body if one is given."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with opener.open(request, timeout=60) as answer:
        return answer.read().decode()


def warm_up(url: str) -> None:
    """Let a server compute a short request that is not measured."""
    body = {"model": SERVED_NAME, "prompt": [1000] * 64, "max_tokens": 8, "ignore_eos": True}
    get(f"{url}/v1/completions", body)


def _answers(url: str) -> bool:
    try:
        get(f"{url}/health")
    except OSError:
        return False
    return True


def metrics(url: str) -> dict[str, float]:
    """Samples of a server's metrics, summed over labels."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(get(f"{url}/metrics")):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


class Poller:
    """Reads a server's metrics twice a second while it is entered.

    Parameters
    ----------
    url : str
    kv_bytes : int
        Of the pool.
    """

    def __init__(self, url: str, kv_bytes: int) -> None:
        self.url, self.kv_bytes = url, kv_bytes
        self._seen: list[dict[str, float]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._poll)

    def __enter__(self) -> Poller:
        self._seen.append(metrics(self.url))
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop.set()
        self._thread.join()
        self._seen.append(metrics(self.url))

    def _poll(self) -> None:
        while not self._stop.wait(POLL_SECONDS):
            self._seen.append(metrics(self.url))

    def figures(self) -> dict[str, Any]:
        """What was seen: the most requests running, and what one held on average."""
        running = [seen["vllm:num_requests_running"] for seen in self._seen]
        held = [seen["vllm:kv_cache_usage_perc"] for seen in self._seen]
        busy = [(n, share) for n, share in zip(running, held, strict=True) if n]

        def grown(name: str) -> float:
            return self._seen[-1].get(name, 0.0) - self._seen[0].get(name, 0.0)

        return {
            "preemptions": grown("vllm:num_preemptions_total"),
            "peak_concurrency": max(running),
            "kv_bytes_per_request": (
                self.kv_bytes * sum(s for _, s in busy) / sum(n for n, _ in busy) if busy else None
            ),
            "compaction_seconds": grown("kvcompress:compaction_seconds_sum"),
            "polls": len(self._seen),
        }
