"""Accounts where there are several API servers, ranks or engines."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import engines
import pytest
from server import Server
from test_engine import make_prompts

from vllm_kvcompress.api.offline import snapshot

MODEL = "SmolLM2-135M-Instruct"
API_KEY = "sk-of-the-tests"
OPTIONS = ["--dtype", "bfloat16", "--kvcompress-budget", "128", "--kvcompress-interval", "32"]
OPTIONS += ["--kvcompress-skip-layers="]  # all layers alike
OPTIONS += ["--kv-cache-memory-bytes", str(64 << 20), "--block-size", "32"]
OPTIONS += ["--max-model-len", "2048"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@contextmanager
def serving(directory: Path, *options: str) -> Iterator[Server]:
    server = Server([*OPTIONS, *options], directory / "log", API_KEY)
    try:
        server.wait_until_ready()
        yield server
        server.stop()
    finally:
        print(server.tail())
        server.kill()


def get(server: Server, path: str) -> Any:
    # A connection for each question: several servers take turns at them.
    headers = {"Authorization": f"Bearer {API_KEY}", "Connection": "close"}
    answer = server.http.get(f"/v1/kvcompress/{path}", headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.json()


def ask(server: Server, number: int) -> Any:
    prompt = f"{number}. " + "The grass is green. The sky is blue. " * 40
    return server.client().completions.create(
        model=MODEL, prompt=prompt, max_tokens=40, temperature=0, extra_body={"ignore_eos": True}
    )


def ask_many(server: Server, count: int) -> list[Any]:
    with ThreadPoolExecutor(count) as clients:
        return list(clients.map(lambda number: ask(server, number), range(count)))


def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = sorted(os.sched_getaffinity(0))
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", f"{cores[0]}|{cores[-1]}")


def test_two_api_servers(tmp_path: Path) -> None:
    """Whoever answers knows of all requests, and counts nothing twice."""
    with serving(tmp_path, "--api-server-count", "2") as server:
        answers = ask_many(server, 6)
        time.sleep(1.2)
        for _ in range(12):
            (engine,) = get(server, "summary")["engines"]
            assert engine["totals"]["requests"] == {"kvdiff": 6}
            found = get(server, "requests")["requests"]
            assert len(found) == 6
            for answer in answers:
                assert any(r["id"].startswith(answer.id) for r in found)
            metrics = server.metrics()
            assert metrics["kvcompress:requests_total"] == 6
            assert metrics["kvcompress:pool_blocks"] == engine["pool"]["blocks"] - 1
            assert metrics["kvcompress:request_kv_bytes_count"] == 12
            assert metrics["vllm:request_success_total"] == 6
        assert len(set(re.findall(r"ApiServer_(\d)", server.said()))) == 2


def test_two_ranks(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are totals over ranks, and workers in other processes tell of their times."""
    settings = {"method": "knorm", "budget": 128, "recent_tokens": 16, "interval": 16}
    prompts = make_prompts(4, seed=20, shortest=200, longest=400)
    found = []
    for ranks in (1, 2):
        if ranks == 2:
            two_cores(monkeypatch)
        with engines.engine(tiny_llama, settings, tensor_parallel_size=ranks) as engine:
            engine.generate(prompts, 40)
            found.append(snapshot(engine.llm))
            assert snapshot(engine.llm)["totals"] == found[-1]["totals"]
    one, two = found
    assert two["layout"] == one["layout"]
    # 4 layers, 32 tokens, keys and values of 4 heads of 32 numbers of 4 bytes.
    assert one["layout"]["bytes_per_block"] == 4 * 32 * 2 * 4 * 32 * 4
    for key in ("bytes_peak", "bytes_held", "bytes_uncompressed", "bands"):
        assert sorted(str(r[key]) for r in two["closed"]) == sorted(
            str(r[key]) for r in one["closed"]
        )
    for snap in found:
        times = snap["histograms"]["compaction_seconds"]
        assert sum(times["counts"]) > 0 and times["sum"] > 0


def test_two_engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With data parallelism every engine is its own row, and requests are found in either."""
    two_cores(monkeypatch)
    with serving(tmp_path, "--data-parallel-size", "2") as server:
        answers = ask_many(server, 6)
        time.sleep(1.2)
        engines = get(server, "summary")["engines"]
        assert [engine["engine"] for engine in engines] == [0, 1]
        served = [engine["totals"]["requests"].get("kvdiff", 0) for engine in engines]
        assert sum(served) == 6 and min(served) > 0
        found = get(server, "requests")["requests"]
        assert [Counter(r["engine"] for r in found)[index] for index in (0, 1)] == served
        for answer in answers:
            assert get(server, f"requests/{answer.id}")["prompt_tokens"] > 300
        text = server.http.get("/metrics").text
        for index, count in enumerate(served):
            pattern = rf'kvcompress:requests_total{{engine="{index}",method="kvdiff",.*}} (\S+)'
            assert re.findall(pattern, text) == [f"{count}.0"]
        assert get(server, "config")["engines"] == 2
