"""A picture of the dashboard of a running server.

    make serve ARGS="--kvcompress-budget 512 --kvcompress-pyramid-beta 4"
    python -m bench.screenshot --load 16 --seconds 60 --out docs/dashboard.png

Needs Debian's chromium, or another at ``--chromium``, and the Python package playwright (extra
``browser``). The API key is taken from ``VLLM_API_KEY``. Look at the page while the server works:
the charts begin when the page is opened, so it is left open for ``--seconds`` first. ``--load``
gives the server something to do: prompts of random tokens, each request with settings of its own.
"""

from __future__ import annotations

import argparse
import os
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx

CHROMIUM = "/usr/bin/chromium"
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]
"""Run as root and offline: no sandbox of its own, and no calls home."""


def screenshot(
    url: str,
    out: Path,
    *,
    seconds: float = 20.0,
    theme: str = "light",
    size: tuple[int, int] = (1280, 900),
    full_page: bool = False,
    chromium: str = CHROMIUM,
) -> None:
    """Write a PNG of the page after it has been open for a while.

    Parameters
    ----------
    url : str
        Address of the page, with ``#/requests/<id>`` for one request.
    out : Path
        File to write.
    seconds : float
        Time that the page is left open before.
    theme : str
        ``light`` or ``dark``.
    size : tuple[int, int]
        Width and height of the window in CSS pixels.
    full_page : bool
        The whole page instead of what the window shows.
    chromium : str
        The browser.
    """
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
        page = browser.new_page(
            viewport={"width": size[0], "height": size[1]},
            color_scheme="dark" if theme == "dark" else "light",
        )
        page.goto(url)
        status = page.locator("#status")
        status.and_(page.locator(":not([data-state=loading])")).wait_for()
        if status.get_attribute("data-state") == "unauthorised":
            key = os.environ.get("VLLM_API_KEY")
            if not key:
                raise SystemExit("The server asks for its API key: set VLLM_API_KEY.")
            page.locator("#key").fill(key)
            page.keyboard.press("Enter")
        page.wait_for_timeout(seconds * 1000)
        out.parent.mkdir(parents=True, exist_ok=True)
        page.screenshot(path=out, full_page=full_page)
        browser.close()


@contextmanager
def load(url: str, requests: int) -> Iterator[None]:
    """Keep so many requests going, one after another in each thread."""
    key = os.environ.get("VLLM_API_KEY")
    client = httpx.Client(
        base_url=url.removesuffix("/kvcompress"),
        headers={"Authorization": f"Bearer {key}"} if key else {},
        timeout=600,
        trust_env=False,
    )
    model = client.get("/v1/models").json()["data"][0]["id"]
    over = threading.Event()

    def ask(number: int) -> None:
        draw = random.Random(number)
        while not over.is_set():
            wishes: dict[str, Any] = {
                "kvcompress_method": draw.choice(["knorm", "knorm", "keydiff", "streaming"])
            }
            if draw.random() < 0.2:
                wishes = {"kvcompress_enabled": 0}
            body = {
                "model": model,
                "prompt": [draw.randrange(1000, 40000) for _ in range(draw.randrange(300, 1800))],
                "max_tokens": draw.randrange(100, 400),
                "ignore_eos": True,
                "vllm_xargs": wishes,
            }
            try:
                client.post("/v1/completions", json=body)
            except httpx.TransportError:
                return

    threads = [threading.Thread(target=ask, args=(n,), daemon=True) for n in range(requests)]
    for thread in threads:
        thread.start()
    yield
    over.set()
    client.close()


def main() -> None:
    """Read the options and take the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", default="http://127.0.0.1:8000/kvcompress")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=20.0, help="time to leave the page open")
    parser.add_argument("--load", type=int, default=0, help="requests to keep going meanwhile")
    parser.add_argument("--theme", choices=["light", "dark"], default="light")
    parser.add_argument("--width", type=int, default=1280)
    parser.add_argument("--height", type=int, default=900)
    parser.add_argument("--full-page", action="store_true")
    parser.add_argument("--chromium", default=CHROMIUM)
    options = parser.parse_args()
    with load(options.url, options.load) if options.load else nullcontext():
        screenshot(
            options.url,
            options.out,
            seconds=options.seconds,
            theme=options.theme,
            size=(options.width, options.height),
            full_page=options.full_page,
            chromium=options.chromium,
        )


if __name__ == "__main__":
    main()
