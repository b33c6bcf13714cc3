"""The endpoints without a server: engines are schedulers of the tests, asked as vLLM's are."""

from __future__ import annotations

import asyncio
import time
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families
from test_accounts import FLAT, PAGE, SIZE, WIDE, Engine
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler

from vllm_kvcompress.api import metrics, models, routes, views
from vllm_kvcompress.api.plugin import KVCompressEndpoints
from vllm_kvcompress.api.snapshot import NoSnapshotError, Snapshots
from vllm_kvcompress.scheduler import utility
from vllm_kvcompress.settings import CONFIG_KEY

MODEL = "a-model"


class Core(Engine):
    """An engine core that answers utility calls, one of several with data parallelism."""

    def __init__(self, index: int, **options: Any) -> None:
        super().__init__(FLAT, WIDE, **options)
        self.index = index
        self.worker_calls = 0
        self.model_executor = SimpleNamespace(collective_rpc=self._ask_workers)

    def _ask_workers(self, method: str) -> list[dict[str, Any]]:
        assert method == "kvcompress_times"
        self.worker_calls += 1
        return [{"bounds": [0.1, 1.0], "counts": [3, 1, 0], "sum": 0.5}] * 2

    def ask(self, closings: Mapping[int, int], wanted: Sequence[str]) -> dict[str, Any]:
        parallel = self.scheduler.vllm_config.parallel_config
        parallel.data_parallel_index = self.index  # The configuration is shared by the tests.
        try:
            return utility.kvcompress_snapshot(self, closings, wanted)
        finally:
            parallel.data_parallel_index = 0


class Cores:
    """What an API server sees of the engines."""

    def __init__(self, *cores: Core) -> None:
        self.cores = cores
        self.calls: list[list[str]] = []
        self.delay = 0.0
        self.error: Exception | None = None

    async def fetch(self, closings: Mapping[int, int], wanted: Sequence[str]) -> Any:
        self.calls.append(list(wanted))
        await asyncio.sleep(self.delay)
        if self.error is not None:
            raise self.error
        return [core.ask(closings, wanted) for core in self.cores]

    async def call_utility_all_async(self, method: str, *args: Any) -> Any:
        assert method == utility.METHOD
        return await self.fetch(*args)


def run_some(core: Core) -> None:
    """One finished, one running and one waiting request."""
    prefix = f"cmpl-{core.index}"
    core.add_named(f"{prefix}-aa-0-0123abcd", 3)
    core.step(3)
    core.add_named(f"{prefix}-bb-0-0123abcd", 50)
    core.step(4)
    core.add_named(f"{prefix}-cc-0-0123abcd", 50)


@pytest.fixture
def cores() -> Cores:
    found = Cores(Core(0, max_requests=1), Core(1, max_requests=1))
    for core in found.cores:
        run_some(core)
    return found


@pytest.fixture
def snapshots(cores: Cores) -> Snapshots:
    return Snapshots(cores.fetch, 1000, interval=0.2, patience=0.5)


@pytest.fixture
def app(cores: Cores) -> FastAPI:
    """The application as vLLM makes it, as far as the endpoints need it."""
    app = FastAPI()
    app.state.args = Namespace(log_error_stack=False)
    config = SimpleNamespace(
        additional_config={CONFIG_KEY: {"budget": 512}},
        model_config=SimpleNamespace(served_model_name=MODEL, max_model_len=256),
    )
    plugin = KVCompressEndpoints()
    plugin.attach_router(app)
    init_exception_handler(app)
    app.state.vllm_config = config
    client: Any = SimpleNamespace(vllm_config=config, engine_core=cores)
    asyncio.run(plugin.init_state(client, app.state, Namespace()))
    return app


@pytest.fixture
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app) as client:
        yield client


def strict(model: type[Any], answer: Any) -> Any:
    """Read an answer; unknown or missing keys are errors."""
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/json"
    parsed = model.model_validate(answer.json())
    assert parsed.model_dump(mode="json") == answer.json()
    return parsed


# Answers


def test_summary(client: TestClient) -> None:
    found = strict(models.Summary, client.get("/v1/kvcompress/summary"))
    assert [engine.engine for engine in found.engines] == [0, 1]
    for engine in found.engines:
        pool = engine.pool
        assert pool.used + pool.cached + pool.free + pool.null == pool.blocks
        assert engine.bytes_held == pool.used_bytes == pool.used * PAGE
        assert engine.bytes_uncompressed > engine.bytes_held
        assert engine.ratio == engine.bytes_uncompressed / engine.bytes_held
        assert engine.requests.model_dump() == {"running": 1, "waiting": 1, "preempted": 0}
        assert engine.totals.requests == {"kvdiff": 1}
        assert engine.totals.compactions == {"kvdiff": 4}
        assert engine.totals.compaction_seconds == 0.5
        assert 0 <= found.time - engine.time < 60


def test_requests(client: TestClient) -> None:
    every = strict(models.Accounts, client.get("/v1/kvcompress/requests"))
    assert every.total == len(every.requests) == 6
    arrivals = [request.arrival for request in every.requests]
    assert arrivals == sorted(arrivals, reverse=True)
    assert {request.engine for request in every.requests} == {0, 1}
    for state in ("running", "waiting", "finished"):
        some = strict(models.Accounts, client.get(f"/v1/kvcompress/requests?state={state}&limit=1"))
        assert some.total == 2
        assert len(some.requests) == 1
        assert some.requests[0].state == state


@pytest.mark.parametrize("query", ["state=dead", "limit=0", "limit=1001", "limit=x"])
def test_bad_queries(query: str, client: TestClient) -> None:
    answer = client.get(f"/v1/kvcompress/requests?{query}")
    assert answer.status_code == 400
    assert query.split("=")[0] in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ("cmpl-0-aa-0-0123abcd", "cmpl-0-aa-0-0123abcd"),
        ("cmpl-1-aa", "cmpl-1-aa-0-0123abcd"),
        ("cmpl-1-bb", "cmpl-1-bb-0-0123abcd"),
        ("cmpl-1-cc-0", "cmpl-1-cc-0-0123abcd"),
    ],
)
def test_one_request_by_either_id(asked: str, found: str, client: TestClient) -> None:
    report = strict(models.AccountWithHistory, client.get(f"/v1/kvcompress/requests/{asked}"))
    assert report.id == found
    if report.state != "waiting":
        assert [m.tokens for m in report.history[:3]] == [20, 20, 20]
        assert report.history[-1].blocks == [band.blocks for band in report.bands]
        assert sum(report.history[-1].blocks) * PAGE == report.bytes_held


@pytest.mark.parametrize("unknown", ["nobody", "cmpl-0-a", "cmpl", "a/b", "%F0%9F%A6%99"])
def test_unknown_request(unknown: str, client: TestClient) -> None:
    answer = client.get(f"/v1/kvcompress/requests/{unknown}")
    assert answer.status_code == 404
    error = answer.json()["error"]
    assert error["code"] == 404 and "is known" in error["message"]


def test_a_request_younger_than_the_snapshot(client: TestClient, cores: Cores) -> None:
    """Known as soon as its engine knows it, not only once the interval is over."""
    assert client.get("/v1/kvcompress/summary").status_code == 200
    cores.cores[0].add_named("cmpl-young-0-0123abcd", 3)
    found = strict(models.AccountWithHistory, client.get("/v1/kvcompress/requests/cmpl-young"))
    assert found.id == "cmpl-young-0-0123abcd"
    assert found.state == "waiting"


def test_config(client: TestClient) -> None:
    found = strict(models.Config, client.get("/v1/kvcompress/config"))
    assert found.settings["budget"] == 512
    assert (found.model, found.max_model_len, found.engines) == (MODEL, 256, 2)
    assert found.block_size == SIZE
    assert found.pool_bytes == found.pool_blocks * PAGE
    assert [band.model_dump() for band in found.bands] == [
        {
            "band": index,
            "layers": [index],
            "budget": limits.budget,
            "keep_ratio": None,
            "groups": [index],
            "bytes_per_block": PAGE,
        }
        for index, limits in enumerate((FLAT, WIDE))
    ]


def test_openapi_lists_the_endpoints(client: TestClient) -> None:
    paths = client.get("/openapi.json").json()["paths"]
    for path in ("summary", "requests", "requests/{request_id}", "config"):
        answers = paths[f"/v1/kvcompress/{path}"]["get"]["responses"]
        assert "$ref" in answers["200"]["content"]["application/json"]["schema"]
        assert "503" in answers


def test_finished_requests_are_told_of_once_and_kept(client: TestClient, cores: Cores) -> None:
    (core, _) = cores.cores
    seen = {r["id"] for r in client.get("/v1/kvcompress/requests").json()["requests"]}
    core.step(60)
    time.sleep(1)
    after = client.get("/v1/kvcompress/requests?state=finished").json()
    assert after["total"] == 3
    assert {r["id"] for r in after["requests"]} < seen


def test_every_api_server_answers_for_all_engines(cores: Cores) -> None:
    async def ask() -> list[dict[str, Any]]:
        answers = []
        for _ in range(2):
            server = Snapshots(cores.fetch, 1000)
            await server.refresh()
            answers.append(views.accounts(server, None, 100).model_dump(exclude={"time"}))
        return answers

    first, second = asyncio.run(ask())
    assert [r["id"] for r in first["requests"]] == [r["id"] for r in second["requests"]]
    assert first["total"] == 6


def test_without_compression(app: FastAPI) -> None:
    """The endpoints say so, and metrics are vLLM's."""
    bare = FastAPI()
    bare.state.args = app.state.args
    plugin = KVCompressEndpoints()
    plugin.attach_router(bare)
    init_exception_handler(bare)
    config = SimpleNamespace(additional_config={})
    engine: Any = SimpleNamespace(vllm_config=config)
    asyncio.run(plugin.init_state(engine, bare.state, Namespace()))
    asyncio.run(plugin.init_state(None, bare.state, Namespace()))
    with TestClient(bare) as client:
        answer = client.get("/v1/kvcompress/summary")
        assert answer.status_code == 503
        assert "runs without compression" in answer.json()["error"]["message"]
        assert "kvcompress" not in client.get("/metrics").text


# Metrics


def test_metrics(client: TestClient, cores: Cores) -> None:
    text = client.get("/metrics").text
    samples = [
        sample
        for family in text_string_to_metric_families(text)
        if family.name.startswith(metrics.PREFIX)
        for sample in family.samples
    ]
    assert all(sample.labels["model_name"] == MODEL for sample in samples)
    assert {sample.labels["engine"] for sample in samples} == {"0", "1"}
    assert "cmpl-" not in text
    summary = client.get("/v1/kvcompress/summary").json()

    def value(name: str, **labels: str) -> float:
        wanted = {"engine": "1", "model_name": MODEL, **labels}
        (found,) = [
            s.value for s in samples if s.name == f"kvcompress:{name}" and s.labels == wanted
        ]
        return found

    engine = summary["engines"][1]
    for state in ("used", "cached", "free"):
        assert value("pool_blocks", state=state) == engine["pool"][state]
    for state, count in engine["requests"].items():
        assert value("requests", state=state) == count
    assert value("bytes_held") == engine["bytes_held"]
    assert value("bytes_saved") == engine["bytes_uncompressed"] - engine["bytes_held"]
    assert value("ratio") == pytest.approx(engine["ratio"])
    assert value("requests_total", method="kvdiff") == 1
    assert value("compactions_total", method="kvdiff") == 4
    for name in ("tokens_removed", "tokens_merged", "blocks_freed"):
        assert value(f"{name}_total") == engine["totals"][name]
    assert value("compaction_seconds_count") == 4
    assert value("compaction_seconds_sum") == 0.5
    assert value("compaction_seconds_bucket", le="0.1") == 3
    assert value("compaction_seconds_bucket", le="1.0") == 4
    finished = client.get("/v1/kvcompress/requests?state=finished").json()["requests"]
    peak = next(r["bytes_peak"] for r in finished if r["engine"] == 1)
    assert value("request_kv_bytes_sum", at="peak") == peak
    assert value("request_kv_bytes_count", at="finish") == 1


def test_metrics_by_name(client: TestClient) -> None:
    text = client.get("/metrics?name[]=kvcompress:blocks_freed_total").text
    assert {f.name for f in text_string_to_metric_families(text)} == {"kvcompress:blocks_freed"}


def test_metrics_of_vllm_stay(client: TestClient) -> None:
    assert "python_info" in client.get("/metrics").text


def test_metrics_without_an_engine(client: TestClient, cores: Cores) -> None:
    """What vLLM counts is still to be had."""
    cores.error = RuntimeError("dead")
    answer = client.get("/metrics")
    assert answer.status_code == 200
    assert "python_info" in answer.text and "kvcompress:" not in answer.text


# How often the engines are asked


def test_many_viewers_make_one_call(snapshots: Snapshots, cores: Cores) -> None:
    async def watch() -> None:
        await asyncio.gather(*(snapshots.refresh() for _ in range(50)))
        assert len(cores.calls) == 1
        await asyncio.gather(*(snapshots.refresh() for _ in range(50)))
        assert len(cores.calls) == 1
        await asyncio.sleep(0.25)
        await asyncio.gather(*(snapshots.refresh() for _ in range(50)))
        assert len(cores.calls) == 2

    asyncio.run(watch())


def test_answers_are_made_once_per_snapshot(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    accounts = views.accounts
    monkeypatch.setattr(views, "accounts", lambda *args: made.append(args) or accounts(*args))
    texts = {client.get("/v1/kvcompress/requests").text for _ in range(5)}
    assert len(made) <= 2 and len(texts) == len(made)


def test_history_comes_with_the_next_call(snapshots: Snapshots, cores: Cores) -> None:
    async def watch() -> None:
        await snapshots.refresh()
        started = time.monotonic()
        name = "cmpl-0-bb-0-0123abcd"
        await asyncio.gather(*(snapshots.refresh(name) for _ in range(5)))
        assert time.monotonic() - started > 0.1, "asked again at once"
        assert cores.calls == [[], [name]]
        assert snapshots.engines[0]["histories"].keys() == {name}
        for number in range(40):
            snapshots._want(f"other-{number}")
        assert len(snapshots._wanted) == 16

    asyncio.run(watch())


def test_workers_are_asked_only_after_a_compaction(snapshots: Snapshots, cores: Cores) -> None:
    async def watch() -> None:
        core = cores.cores[0]
        await snapshots.refresh()
        assert core.worker_calls == 1
        await asyncio.sleep(0.25)
        await snapshots.refresh()
        assert core.worker_calls == 1
        core.step(12)
        await asyncio.sleep(0.25)
        await snapshots.refresh()
        assert core.worker_calls == 2

    asyncio.run(watch())


def test_a_busy_engine_shows_what_it_last_said(snapshots: Snapshots, cores: Cores) -> None:
    async def watch() -> None:
        await snapshots.refresh()
        before = snapshots.engines[0]["time"]
        await asyncio.sleep(0.25)
        cores.delay = 1.5
        await snapshots.refresh()
        await snapshots.refresh()
        assert snapshots.engines[0]["time"] == before
        assert len(cores.calls) == 2, "a second call while the first is under way"
        await asyncio.sleep(1)
        assert snapshots.engines[0]["time"] > before

    asyncio.run(watch())


def test_an_engine_that_is_busy_from_the_start(snapshots: Snapshots, cores: Cores) -> None:
    cores.delay = 1.0
    with pytest.raises(NoSnapshotError, match="busy"):
        asyncio.run(snapshots.refresh())


def test_an_engine_that_is_gone(app: FastAPI, cores: Cores) -> None:
    with TestClient(app) as client:
        cores.error = RuntimeError("dead")
        answer = client.get("/v1/kvcompress/summary")
        assert answer.status_code == 503
        assert answer.json()["error"]["message"] == "kvcompress: the engine does not answer."
        cores.error = None
        assert client.get("/v1/kvcompress/summary").status_code == 200


# The dashboard's files


def test_dashboard() -> None:
    served = FastAPI()
    routes.attach(served)
    with TestClient(served) as client:
        page = client.get("/kvcompress")
        assert "<title>KV cache compression" in page.text
        assert page.headers["content-type"].startswith("text/html")
        script = client.get("/kvcompress/app.js")
        assert "import" in script.text and "javascript" in script.headers["content-type"]
        for answer in (page, script):
            assert answer.headers["content-security-policy"].startswith("default-src 'self';")
        assert client.get("/kvcompress/../pyproject.toml").status_code == 404
        assert client.get("/kvcompress/%2e%2e/routes.py").status_code == 404
        assert client.get("/kvcompress/no-such-file.js").status_code == 404
