"""The JSON endpoints with made-up data, for looking at the dashboard without an engine.

    python -m tests.dashboard_stub --port 8001     # then open http://127.0.0.1:8001/kvcompress

Everything is a function of the time since the start: request k arrives at ``k * INTERVAL``, waits,
is prefilled, decodes at a steady rate and ends. So what the endpoints tell at one moment fits
together: counters are sums over requests, the pool's numbers sums over those that run.
"""

from __future__ import annotations

import argparse
import math
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, Response

from vllm_kvcompress.api.page import attach_page

BLOCK_SIZE = 32
BYTES_PER_BLOCK = 122_880
BUDGETS = (768, 660, 550, 440, 330, 224)
"""Tokens kept in each band of five layers; each band is one KV cache group."""
CHECK_EVERY = 128
POOL_BLOCKS = 4096
INTERVAL = 0.9
METHODS = ("knorm", "knorm", "keydiff", "merge", "none")
TOKENS_PER_SECOND = 22.0


@dataclass(frozen=True)
class StubRequest:
    """Request ``k``; times are seconds since the stub's start."""

    k: int
    engines: int
    name: str

    @property
    def method(self) -> str:
        return METHODS[self.k % len(METHODS)]

    @property
    def engine(self) -> int:
        return self.k % self.engines

    @property
    def prompt(self) -> int:
        return 400 + self.k * 577 % 2400

    @property
    def output(self) -> int:
        return 120 + self.k * 89 % 300

    @property
    def arrival(self) -> float:
        return self.k * INTERVAL

    @property
    def queue(self) -> float:
        return 0.02 + (2.6 if self.k % 7 == 3 else 0.05 * (self.k % 3))

    @property
    def prefill(self) -> float:
        return self.prompt / 1800

    @property
    def away(self) -> float:
        """Seconds it waits again after a preemption, right after its prefill."""
        return 3.0 if self.k % 11 == 7 else 0.0

    @property
    def begin(self) -> float:
        return self.arrival + self.queue

    @property
    def decode_from(self) -> float:
        return self.begin + self.prefill + self.away

    @property
    def end(self) -> float:
        return self.decode_from + self.output / TOKENS_PER_SECOND

    def state(self, now: float) -> str:
        if now >= self.end:
            return "finished"
        absent = self.begin + self.prefill <= now < self.decode_from
        return "waiting" if now < self.begin or absent else "running"

    def output_tokens(self, now: float) -> int:
        done = (min(now, self.end) - self.decode_from) * TOKENS_PER_SECOND
        return min(self.output, max(0, round(done)))

    def tokens(self, now: float) -> int:
        """Tokens whose keys and values were computed and not lost to a preemption."""
        if now < self.begin or (self.state(now) == "waiting"):
            return 0
        if now < self.begin + self.prefill:
            return int(self.prompt * (now - self.begin) / self.prefill)
        return self.prompt + self.output_tokens(now)

    def kept(self, now: float, budget: int) -> int:
        """Tokens or pooled slots that a band holds; it may grow between two compactions."""
        tokens = self.tokens(now)
        if self.method == "none" or tokens < self.prompt:
            return tokens
        grown = self.output_tokens(now) % CHECK_EVERY
        return min(tokens, budget + grown)

    def blocks(self, now: float) -> list[int]:
        return [math.ceil(self.kept(now, budget) / BLOCK_SIZE) for budget in BUDGETS]

    def uncompressed(self, now: float) -> int:
        return math.ceil(self.tokens(now) / BLOCK_SIZE) * len(BUDGETS) * BYTES_PER_BLOCK

    def held(self, now: float) -> int:
        return sum(self.blocks(now)) * BYTES_PER_BLOCK

    def compactions(self, now: float) -> int:
        if self.method == "none" or now < self.decode_from:
            return 0
        times = 1 + self.output_tokens(now) // CHECK_EVERY
        return times * sum(self.prompt > budget for budget in BUDGETS)

    def bands(self, now: float) -> list[dict[str, int]]:
        bands = []
        for band, budget in enumerate(BUDGETS):
            kept = self.kept(now, budget)
            gone = self.tokens(now) - kept
            merges = self.method == "merge"
            bands.append(
                {
                    **{"band": band, "group": band, "layers": 5, "tokens_kept": kept},
                    "blocks": self.blocks(now)[band],
                    "tokens_removed": 0 if merges else gone,
                    "tokens_merged": gone if merges else 0,
                }
            )
        return bands


@dataclass
class Stub:
    """The stub's data and knobs; tests turn the knobs while it serves."""

    api_key: str | None = None
    engines: int = 1
    empty: bool = False
    missing: bool = False
    """As a server without the plugin: every endpoint is unknown."""
    delay: float = 0.0
    names: dict[int, str] = field(default_factory=dict)
    """Ids of single requests; the others are made up."""
    model: str = "SmolLM2-135M-Instruct"
    warm: float = 120.0
    """Seconds of past that it has at the start."""
    started: float = field(default_factory=time.time)

    def now(self) -> float:
        return time.time() - self.started + self.warm

    def absolute(self, seconds: float) -> float:
        return self.started - self.warm + seconds

    def all(self, now: float) -> list[StubRequest]:
        count = 0 if self.empty else int(now / INTERVAL) + 1
        return [
            StubRequest(
                k, self.engines, self.names.get(k, f"chatcmpl-{k * 2654435761 % 2**32:08x}")
            )
            for k in range(count)
        ]

    def config(self) -> dict[str, Any]:
        return {
            **{"version": "0.1.0", "vllm_version": "0.32.0", "model": self.model},
            **{"block_size": BLOCK_SIZE, "max_budget": 4096, "max_model_len": 4096},
            "settings": {"method": "knorm", "budget": 768, "keep_ratio": None, "interval": 128},
            "methods": [*dict.fromkeys(METHODS)],
            "bands": [
                {
                    **{"band": band, "budget": budget, "keep_ratio": None, "groups": [band]},
                    "layers": list(range(5 * band, 5 * band + 5)),
                    "bytes_per_block": BYTES_PER_BLOCK,
                }
                for band, budget in enumerate(BUDGETS)
            ],
            "pool_blocks": POOL_BLOCKS,
            "pool_bytes": POOL_BLOCKS * BYTES_PER_BLOCK,
            "engines": self.engines,
        }

    def summary(self) -> dict[str, Any]:
        now = self.now()
        requests = self.all(now)
        engines = [
            self._engine(index, now, [each for each in requests if each.engine == index])
            for index in range(self.engines)
        ]
        return {"time": self.absolute(now), "engines": engines}

    def _engine(self, index: int, now: float, requests: list[StubRequest]) -> dict[str, Any]:
        running = [each for each in requests if each.state(now) == "running"]
        waiting = [each for each in requests if each.state(now) == "waiting"]
        held = sum(each.held(now) for each in running)
        stock = sum(each.uncompressed(now) for each in running)
        used = held // BYTES_PER_BLOCK
        cached = min(POOL_BLOCKS - 1 - used, 300 + int(now) % 40 * 5)
        pool = {"blocks": POOL_BLOCKS, "used": used, "cached": cached, "null": 1}
        pool["free"] = POOL_BLOCKS - used - cached - 1
        pool |= {
            f"{name}_bytes": pool[name] * BYTES_PER_BLOCK for name in ("used", "cached", "free")
        }
        pool["bytes"] = POOL_BLOCKS * BYTES_PER_BLOCK
        totals: dict[str, Any] = {"requests": {}, "compactions": {}}
        for each in requests:
            for name, value in (("requests", 1), ("compactions", each.compactions(now))):
                totals[name][each.method] = totals[name].get(each.method, 0) + value
        bands = [band for each in requests for band in each.bands(now)]
        compactions = sum(totals["compactions"].values())
        totals |= {
            "tokens_removed": sum(band["tokens_removed"] for band in bands),
            "tokens_merged": sum(band["tokens_merged"] for band in bands),
            "blocks_freed": 11 * compactions,
            "preemptions": sum(bool(each.away) and now >= each.decode_from for each in requests),
            "compaction_seconds": 0.0012 * compactions
            + 7e-6 * sum(each.prompt for each in requests if each.compactions(now)),
            "prompt_tokens": sum(each.prompt for each in requests if now >= each.decode_from),
            "output_tokens": sum(each.output_tokens(now) for each in requests),
        }
        return {
            **{"engine": index, "time": self.absolute(now), "pool": pool, "totals": totals},
            "requests": {
                "running": len(running),
                "waiting": len(waiting),
                "preempted": sum(now >= each.begin for each in waiting),
            },
            **{"bytes_held": held, "bytes_uncompressed": stock},
            "ratio": stock / held if held else None,
        }

    def request(self, each: StubRequest, now: float) -> dict[str, Any]:
        state = each.state(now)
        last = min(now, each.end - 1e-6)
        moments = [each.begin + each.prefill * 0.999, last]
        moments += [
            each.decode_from + n * CHECK_EVERY / TOKENS_PER_SECOND - 0.05 for n in (1, 2, 3)
        ]
        seen = [moment for moment in moments if moment <= last]
        held = each.held(now) if state == "running" else 0
        stock = each.uncompressed(now) if state == "running" else 0
        begun = now >= each.begin
        return {
            **{"id": each.name, "engine": each.engine, "state": state, "method": each.method},
            "finish_reason": ("length" if each.k % 3 else "stop") if state == "finished" else None,
            "settings": {
                "budget": None if each.method == "none" else BUDGETS[0],
                **{"keep_ratio": None, "prune_after": 0, "context_tokens": None},
            },
            "arrival": self.absolute(each.arrival),
            "queue_seconds": min(now - each.arrival, each.queue),
            "prefill_seconds": min(now - each.begin, each.prefill) if begun else None,
            "decode_seconds": min(now, each.end) - each.decode_from
            if now >= each.decode_from
            else None,
            **{"prompt_tokens": each.prompt, "output_tokens": each.output_tokens(now)},
            "cached_tokens": 64 if each.k % 4 == 0 else 0,
            "preemptions": int(bool(each.away) and now >= each.begin + each.prefill),
            "compactions": each.compactions(now),
            **{"bytes_held": held, "bytes_uncompressed": stock},
            "bytes_peak": max((each.held(moment) for moment in seen), default=0),
            "bytes_uncompressed_peak": max(
                (each.uncompressed(moment) for moment in seen), default=0
            ),
            "ratio": stock / held if held else None,
            "bands": each.bands(last if state == "finished" else now),
        }

    def history(self, each: StubRequest, now: float) -> list[dict[str, Any]]:
        """Events only: the start, before and after each compaction, the end."""
        last = min(now, each.end - 1e-6)
        between = CHECK_EVERY / TOKENS_PER_SECOND
        compacted = [each.decode_from + n * between for n in range(4)]
        events = [each.begin]
        for moment in compacted:
            # Half a token before it, and at it.
            events += [
                moment - 0.5 / TOKENS_PER_SECOND - each.away * (moment == compacted[0]),
                moment,
            ]
        return [
            {
                "time": self.absolute(moment),
                "tokens": each.tokens(moment),
                "bytes_held": each.held(moment),
                "bytes_uncompressed": each.uncompressed(moment),
                "blocks": each.blocks(moment),
            }
            for moment in [*(moment for moment in events if moment < last), last]
            if now >= each.begin
        ]


def error(status: int, message: str) -> JSONResponse:
    """An error as vLLM writes it."""
    body = {"message": message, "type": "NotFoundError", "param": None, "code": status}
    return JSONResponse({"error": body}, status)


def make_app(stub: Stub) -> FastAPI:
    """The page and the endpoints that it asks."""
    app = FastAPI()

    @app.middleware("http")
    async def guard(request: Request, call_next: Any) -> Response:
        if request.url.path.startswith("/v1"):
            time.sleep(stub.delay)
            wanted = f"Bearer {stub.api_key}"
            if stub.api_key and request.headers.get("Authorization") != wanted:
                return JSONResponse({"error": "Unauthorized"}, 401)
            if stub.missing:
                return JSONResponse({"detail": "Not Found"}, 404)
        return await call_next(request)

    @app.get("/v1/kvcompress/config")
    def config() -> dict[str, Any]:
        return stub.config()

    @app.get("/v1/kvcompress/summary")
    def summary() -> dict[str, Any]:
        return stub.summary()

    @app.get("/v1/kvcompress/requests")
    def requests(state: str | None = None, limit: int = 100) -> dict[str, Any]:
        now = stub.now()
        found = [each for each in stub.all(now) if state in (None, each.state(now))]
        newest = found[::-1][:limit]
        return {
            "time": stub.absolute(now),
            "requests": [stub.request(each, now) for each in newest],
            "total": len(found),
        }

    @app.get("/v1/kvcompress/requests/{request_id:path}")
    def one(request_id: str) -> Any:
        now = stub.now()
        for each in stub.all(now):
            if each.name == request_id:
                return stub.request(each, now) | {"history": stub.history(each, now)}
        return error(404, f"The request {request_id!r} is not known.")

    attach_page(app)
    return app


class StubServer:
    """A stub on a port of this machine; may be stopped and started again on the same port."""

    def __init__(self, stub: Stub, port: int) -> None:
        self.stub = stub
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        config = uvicorn.Config(
            make_app(self.stub), port=self.port, log_level="warning", timeout_graceful_shutdown=1
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise RuntimeError(f"port {self.port} cannot be used")
            time.sleep(0.02)

    def stop(self) -> None:
        if self._server and self._thread:
            self._server.should_exit = True
            self._thread.join(10)


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--engines", type=int, default=1)
    parser.add_argument("--api-key")
    parser.add_argument("--empty", action="store_true")
    arguments = parser.parse_args()
    stub = Stub(arguments.api_key, arguments.engines, arguments.empty)
    uvicorn.run(make_app(stub), port=arguments.port, log_level="warning")


if __name__ == "__main__":
    main()
