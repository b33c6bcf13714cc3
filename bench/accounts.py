"""What memory accounts cost, as ratios of paired runs in one engine, as JSON.

    python -m bench.accounts            # about 12 minutes on 2 cores
    python -m bench.accounts --quick    # a few tokens, only to see that it works

``unwatched``: decoding at batch 32 with accounts and without, and the share of time that was
spent in them. ``watched``: a server that decodes at batch 32 all the time, with five dashboards
polling and without in turn, a window of some seconds each. The dashboards run at the lowest
priority, since they share the machine with the server here.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from statistics import median
from typing import Any, NamedTuple

import httpx
import psutil

from bench.harness.engines import make_engine, make_prompts, run, scheduler_of
from bench.harness.machine import ROOT, in_its_own_process, machine, spread
from bench.harness.server import metrics
from vllm_kvcompress.scheduler.snapshot import take_snapshot

BATCH = 32
VIEWERS = 5
SETTINGS = {"budget": 256, "interval": 64, "bands": 6}
"""Six groups and frequent compactions: the accounts of many events."""

WINDOWS = 3
"""Pairs of windows for each pair of runs of the other part, which take longer."""

WINDOW_SECONDS = 10.0
SETTLE_SECONDS = 2.0
"""What is counted of watched or unwatched decoding, and what passes before."""

PATHS = ("summary", "requests?limit=200")
"""What a dashboard asks for every second."""


class NoAccounts:
    """Stands for accounts in an engine that keeps none."""

    starting: dict[str, Any] = {}  # noqa: RUF012

    def nothing(self, *_: Any) -> None:
        """Do nothing."""

    scheduled = tokens_arrived = compacted = releasing = asked_for = nothing


def unwatched(pairs: int, batch: int, prompt: int, output: int) -> dict[str, Any]:
    """The cost while nobody asks."""
    engine = make_engine(SETTINGS, kv_bytes=512 << 20)
    scheduler = scheduler_of(engine)
    prompts = make_prompts(batch, prompt)
    accounts = scheduler.kvcompress_accounts

    def seconds(kept: Any) -> float:
        scheduler.kvcompress_accounts = scheduler.kvcompress.accounts = kept
        return run(engine, prompts, output)

    seconds(accounts)
    ratios = []
    for pair in range(pairs):
        order = (NoAccounts(), accounts) if pair % 2 == 0 else (accounts, NoAccounts())
        took = {kept is accounts: seconds(kept) for kept in order}
        ratios.append(took[False] / took[True])
    spent = 0.0

    def timed(method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def wrapper(*args: Any) -> Any:
            nonlocal spent
            started = time.perf_counter()
            try:
                return method(*args)
            finally:
                spent += time.perf_counter() - started

        return wrapper

    for name in ("scheduled", "tokens_arrived", "compacted", "releasing", "asked_for"):
        setattr(accounts, name, timed(getattr(accounts, name)))
    total = seconds(accounts)
    share = spent / total
    snapshots: list[float] = []
    scheduled = accounts.scheduled
    closings = take_snapshot(scheduler)["closings"]

    def and_snapshot(*args: Any) -> Any:
        started = time.perf_counter()
        take_snapshot(scheduler, closings)
        snapshots.append(time.perf_counter() - started)
        return scheduled(*args)

    accounts.scheduled = and_snapshot
    seconds(accounts)
    return {
        "throughput_ratio": spread(ratios),
        "share_of_time": share,
        # Engines are asked once a second, however many watch.
        "snapshot_seconds": {"median": median(snapshots), "max": max(snapshots)},
    }


def watched(pairs: int, batch: int, prompt: int, _: int) -> dict[str, Any]:
    """The cost of five dashboards on a server."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [f"--kvcompress-{name}={value}" for name, value in SETTINGS.items()]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    server = subprocess.Popen(
        [sys.executable, "serve.py", "--port", str(port), "--dtype", "bfloat16", *options],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.DEVNULL,
    )
    try:
        return asyncio.run(_watched(server, f"http://127.0.0.1:{port}", pairs, batch, prompt))
    finally:
        server.terminate()
        server.wait()


async def _watched(
    server: subprocess.Popen[bytes], url: str, pairs: int, batch: int, prompt: int
) -> dict[str, Any]:
    # Of different lengths, so that not all are compacted in the same step.
    prompts = [p["prompt_token_ids"][index:] for index, p in enumerate(make_prompts(batch, prompt))]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url, timeout=3600, trust_env=False, limits=limits
    ) as client:
        while not await _healthy(client):
            if server.poll() is not None:
                raise RuntimeError("the server did not start")
            await asyncio.sleep(1)
        listed = (await client.get("/v1/models")).json()["data"][0]
        longest = listed["max_model_len"] - prompt

        async def complete(tokens: list[int]) -> None:
            body = {"model": listed["id"], "prompt": tokens, "max_tokens": longest}
            answer = await client.post("/v1/completions", json={**body, "ignore_eos": True})
            answer.raise_for_status()

        decoding = asyncio.gather(*map(complete, prompts))
        window = WINDOW_SECONDS if pairs > 1 else 2
        pairs *= WINDOWS
        while await _generated(url) < 2 * batch:
            if decoding.done():
                await decoding  # raises what went wrong
                raise RuntimeError("the requests ended at once")
            await asyncio.sleep(1)
        found, used = [], []
        answers = 0
        for pair in range(pairs):
            seen: dict[int, Window] = {}
            for viewers in (0, VIEWERS) if pair % 2 == 0 else (VIEWERS, 0):
                with watching(url, viewers) as counted:
                    await asyncio.sleep(SETTLE_SECONDS)
                    seen[viewers] = await _window(url, server.pid, window)
                answers += sum(counted)
            if decoding.done():
                await decoding
                raise RuntimeError("the requests ended before the pairs did: ask for fewer")
            found.append(seen[VIEWERS].tokens_per_second / seen[0].tokens_per_second)
            used.append(seen[VIEWERS].cpu_per_second - seen[0].cpu_per_second)
        decoding.cancel()
    return {
        "throughput_ratio": spread(found),
        "server_cpu_seconds_per_second": spread(used),
        "window_seconds": window,
        "answers_to_viewers": answers,
    }


class Window(NamedTuple):
    """What a server did in a while.

    Attributes
    ----------
    tokens_per_second : float
        Generated.
    cpu_per_second : float
        Processor seconds of the API server, without those of the engine, which uses all it gets.
    """

    tokens_per_second: float
    cpu_per_second: float


async def _window(url: str, pid: int, seconds: float) -> Window:
    api_server = psutil.Process(pid)
    before, cpu, started = await _generated(url), api_server.cpu_times(), time.perf_counter()
    await asyncio.sleep(seconds)
    after, now = await _generated(url), api_server.cpu_times()
    took = time.perf_counter() - started
    used = now.user + now.system - cpu.user - cpu.system
    return Window((after - before) / took, used / took)


async def _generated(url: str) -> float:
    """Tokens generated since the server started."""
    return (await asyncio.to_thread(metrics, url))["vllm:generation_tokens_total"]


@contextmanager
def watching(url: str, viewers: int) -> Iterator[list[int]]:
    """Dashboards in a process of the lowest priority: in life they are on other machines.

    What they cost the server counts, what they cost themselves hardly does. The list that is
    yielded has the number of answers they got, once they have stopped.
    """
    answers: list[int] = []
    if not viewers:
        yield answers
        return
    command = [sys.executable, "-m", "bench.accounts", "--view", url]
    viewing = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert viewing.stdin is not None and viewing.stdout is not None
    if viewing.stdout.readline() != "ready\n":
        raise RuntimeError("the dashboards did not start")
    try:
        yield answers
    finally:
        found, _ = viewing.communicate()  # Closes its input, at which it ends.
    if viewing.returncode:
        raise RuntimeError("a dashboard failed")
    answers.append(int(found))


async def view(url: str) -> int:
    """Ask what dashboards ask for, every second, until standard input ends."""
    answers = 0

    async def dashboard(client: httpx.AsyncClient) -> None:
        nonlocal answers
        while True:
            for path in PATHS:
                (await client.get(f"/v1/kvcompress/{path}")).raise_for_status()
                answers += 1
            await asyncio.sleep(1)

    os.nice(19)
    async with httpx.AsyncClient(base_url=url, timeout=600, trust_env=False) as client:
        print("ready", flush=True)
        asking = [asyncio.create_task(dashboard(client)) for _ in range(VIEWERS)]
        ended = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
        done, _ = await asyncio.wait([*asking, ended], return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        for task in asking:
            task.cancel()
    return answers


async def _healthy(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/health")).status_code == 200
    except httpx.TransportError:
        return False


PARTS = {"unwatched": unwatched, "watched": watched}


def main() -> None:
    """Run both parts, or the one that a child process was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a few tokens only")
    parser.add_argument("--pairs", type=int, default=7, help="pairs of runs")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--view", metavar="URL", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.view:
        print(asyncio.run(view(options.view)))
        return
    pairs, *shape = (1, 4, 300, 12) if options.quick else (options.pairs, BATCH, 400, 256)
    if options.part:
        print(json.dumps(PARTS[options.part](pairs, *shape)))
        return
    common = (["--quick"] if options.quick else []) + ["--pairs", str(options.pairs)]
    report = {
        "command": "python -m bench.accounts " + " ".join(sys.argv[1:]),
        "machine": machine(),
        "workload": {
            **dict(zip(("requests", "prompt_tokens", "output_tokens"), shape, strict=True)),
            "settings": SETTINGS,
            "viewers": VIEWERS,
            "model": "SmolLM2-135M-Instruct, bfloat16",
        },
        **{
            name: in_its_own_process("--part", name, *common, module="bench.accounts")
            for name in PARTS
        },
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
