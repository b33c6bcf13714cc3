"""The HTTP endpoints: JSON for programs and the dashboard, metrics, the dashboard's files."""

from __future__ import annotations

from collections.abc import Callable
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, HTTPException, Query, Request
from fastapi.responses import Response
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from vllm.entrypoints.serve.engine.protocol import ErrorResponse

from vllm_kvcompress.api import metrics, models, views
from vllm_kvcompress.api.page import attach_page
from vllm_kvcompress.api.snapshot import NoSnapshotError, Snapshots

MAX_RENDERED = 64
"""Different answers kept until the next snapshot."""

router = APIRouter(prefix="/v1/kvcompress", tags=["kvcompress"])

_UNAVAILABLE: dict[int | str, dict[str, Any]] = {
    HTTPStatus.SERVICE_UNAVAILABLE.value: {"model": ErrorResponse}
}
_NOT_FOUND: dict[int | str, dict[str, Any]] = {HTTPStatus.NOT_FOUND.value: {"model": ErrorResponse}}


def attach(app: FastAPI) -> None:
    """Add all routes to the API server."""
    app.include_router(router)
    # vLLM puts this in the place of its own route, whose metrics it includes.
    app.add_api_route("/metrics", show_metrics, methods=["GET"], include_in_schema=False)
    attach_page(app)


@router.get("/summary", response_model=models.Summary, responses=_UNAVAILABLE)
async def get_summary(request: Request) -> Response:
    """Pool, requests and totals of every engine."""
    snapshots = await _fresh(request)
    return _rendered(snapshots, "summary", lambda: views.summary(snapshots))


@router.get("/requests", response_model=models.Accounts, responses=_UNAVAILABLE)
async def get_requests(
    request: Request,
    state: models.State | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
) -> Response:
    """Memory accounts of requests, newest first."""
    snapshots = await _fresh(request)
    return _rendered(
        snapshots, ("requests", state, limit), lambda: views.accounts(snapshots, state, limit)
    )


@router.get(
    "/requests/{request_id:path}",
    response_model=models.AccountWithHistory,
    responses=_UNAVAILABLE | _NOT_FOUND,
)
async def get_request(request: Request, request_id: str) -> Response:
    """Memory account of one request and its course, by the id of its response."""
    snapshots = await _fresh(request)
    report = views.find(snapshots, request_id)
    if report is None:
        # It may be younger than the snapshot.
        snapshots = await _fresh(request, request_id)
        report = views.find(snapshots, request_id)
    if report is not None and report["state"] != "finished":
        # Its history is in the next snapshot, by which time it may have finished.
        snapshots = await _fresh(request, report["id"])
        report = views.find(snapshots, report["id"])
    if report is None:
        raise HTTPException(
            HTTPStatus.NOT_FOUND, f"kvcompress: no request {request_id!r} is known (any more)."
        )
    found = report
    return _rendered(snapshots, ("request", found["id"]), lambda: views.account(snapshots, found))


@router.get("/config", response_model=models.Config, responses=_UNAVAILABLE)
async def get_config(request: Request) -> Response:
    """Settings, bands and pool; they do not change while the server runs."""
    snapshots = await _fresh(request)
    state = request.app.state
    return _rendered(
        snapshots,
        "config",
        lambda: views.config(snapshots, state.kvcompress_settings, state.vllm_config),
    )


async def show_metrics(request: Request) -> Response:
    """The metrics of vLLM and ours."""
    found: list[metrics.Metric] = []
    snapshots: Snapshots | None = getattr(request.app.state, "kvcompress", None)
    if snapshots is not None:
        try:
            await snapshots.refresh()
            name = views.model_name(request.app.state.vllm_config)
            found = metrics.collect(snapshots.engines.values(), name)
        except NoSnapshotError:
            pass  # vLLM's own metrics tell what is wrong with the engine.
    text = metrics.exposition(found, set(request.query_params.getlist("name[]")))
    return Response(text, headers={"Content-Type": CONTENT_TYPE_LATEST})


async def _fresh(request: Request, wanted: str | None = None) -> Snapshots:
    snapshots: Snapshots | None = getattr(request.app.state, "kvcompress", None)
    if snapshots is None:
        raise HTTPException(
            HTTPStatus.SERVICE_UNAVAILABLE,
            "kvcompress: this server runs without compression, so there are no accounts.",
        )
    try:
        await snapshots.refresh(wanted)
    except NoSnapshotError as error:
        raise HTTPException(HTTPStatus.SERVICE_UNAVAILABLE, str(error)) from error
    return snapshots


def _rendered(snapshots: Snapshots, key: object, make: Callable[[], BaseModel]) -> Response:
    """JSON of a model, made once per snapshot: many viewers cost what one does."""
    text = snapshots.rendered.get(key)
    if text is None:
        text = make().model_dump_json().encode()
        if len(snapshots.rendered) < MAX_RENDERED:
            snapshots.rendered[key] = text
    return Response(text, media_type="application/json")
