"""From snapshots of the engines to what the endpoints answer."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator
from typing import Any

from vllm.config import VllmConfig
from vllm.version import __version__ as vllm_version

import vllm_kvcompress
from vllm_kvcompress.api import models
from vllm_kvcompress.api.snapshot import Snapshots
from vllm_kvcompress.settings import Settings


def summary(snapshots: Snapshots) -> models.Summary:
    """What all engines hold."""
    engines = []
    for _, found in sorted(snapshots.engines.items()):
        held = sum(report["bytes_held"] for report in found["live"])
        uncompressed = sum(report["bytes_uncompressed"] for report in found["live"])
        engines.append(
            {key: found[key] for key in ("engine", "time", "pool", "requests", "totals")}
            | {
                "bytes_held": held,
                "bytes_uncompressed": uncompressed,
                "ratio": uncompressed / held if held else None,
            }
        )
    return models.Summary.model_validate({"time": time.time(), "engines": engines})


def accounts(snapshots: Snapshots, state: models.State | None, limit: int) -> models.Accounts:
    """Accounts of requests by arrival, newest first."""
    found = [r for r in _reports(snapshots) if state is None or r["state"] == state]
    total = len(found)
    if state in (None, "waiting"):  # An engine lists only so many of those that wait.
        for engine in snapshots.engines.values():
            listed = sum(report["state"] == "waiting" for report in engine["live"])
            total += engine["requests"]["waiting"] - listed
    found.sort(key=lambda report: report["arrival"], reverse=True)
    answer = {"time": time.time(), "requests": found[:limit], "total": total}
    return models.Accounts.model_validate(answer)


def find(snapshots: Snapshots, request_id: str) -> dict[str, Any] | None:
    """The account with an id: the engine's, or that of a response; the newest one.

    The engine's id of a request is that of its response, a number if the response has
    several parts, and a random suffix.
    """
    found = [r for r in _reports(snapshots) if r["id"] == request_id]
    if not found:
        parts = re.compile(rf"(\d+_)?{re.escape(request_id)}(-\d+)?-[0-9a-f]{{8}}")
        found = [r for r in _reports(snapshots) if parts.fullmatch(r["id"])]
    return max(found, key=lambda report: report["arrival"], default=None)


def account(snapshots: Snapshots, report: dict[str, Any]) -> models.AccountWithHistory:
    """One account with its history, which ends with the present."""
    history = report.get("history")
    if history is None:
        engine = snapshots.engines[report["engine"]]
        history = engine["histories"].get(report["id"], [])
    return models.AccountWithHistory.model_validate({**report, "history": history})


def config(snapshots: Snapshots, settings: Settings, vllm: VllmConfig) -> models.Config:
    """What does not change while the server runs."""
    first = next(iter(snapshots.engines.values()))
    layout, pool = first["layout"], first["pool"]
    bands: dict[int, dict[str, Any]] = {}
    for index, group in enumerate(layout["groups"]):
        band = bands.setdefault(
            group["band"],
            {
                "band": group["band"],
                "layers": [],
                "budget": group["budget"],
                "keep_ratio": group["keep_ratio"],
                "groups": [],
                "bytes_per_block": layout["bytes_per_block"],
            },
        )
        band["layers"] = sorted({*band["layers"], *group["layers"]})
        band["groups"].append(index)
    return models.Config(
        version=vllm_kvcompress.__version__,
        vllm_version=vllm_version,
        model=model_name(vllm),
        block_size=layout["block_size"],
        settings=settings.model_dump(mode="json"),
        methods=list(settings.methods),
        max_budget=settings.largest_budget,
        max_model_len=vllm.model_config.max_model_len,
        bands=[models.Band.model_validate(band) for _, band in sorted(bands.items())],
        pool_blocks=pool["blocks"],
        pool_bytes=pool["bytes"],
        engines=len(snapshots.engines),
    )


def model_name(vllm: VllmConfig) -> str:
    """Name the model is served under, as vLLM's own metrics have it."""
    return str(vllm.model_config.served_model_name)


def _reports(snapshots: Snapshots) -> Iterator[dict[str, Any]]:
    lists: list[Iterable[dict[str, Any]]] = [e["live"] for e in snapshots.engines.values()]
    for reports in (*lists, *snapshots.finished.values()):
        yield from reports
