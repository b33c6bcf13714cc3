"""Serving the dashboard: a few static files, under a strict Content-Security-Policy."""

from __future__ import annotations

from pathlib import Path

from fastapi import FastAPI
from starlette.responses import FileResponse, RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

STATIC = Path(__file__).parent / "static"

HEADERS = {
    "Content-Security-Policy": "default-src 'self'; object-src 'none'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # Asked for again each time, answered with 304: an upgrade shows without a forced reload.
    "Cache-Control": "no-cache",
}


class _Assets(StaticFiles):
    async def get_response(self, path: str, scope: Scope) -> Response:
        if path in (".", "index.html"):
            # The page's own addresses are relative to /kvcompress without a slash.
            return RedirectResponse("../kvcompress")
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response


def attach_page(app: FastAPI) -> None:
    """Serve the page at ``/kvcompress`` and what it loads below that.

    The files hold no data and need no API key; the JSON endpoints that the page asks do.
    """

    @app.get("/kvcompress", include_in_schema=False)
    async def page() -> FileResponse:
        return FileResponse(STATIC / "index.html", headers=HEADERS)

    app.mount("/kvcompress", _Assets(directory=STATIC), name="kvcompress")
