"""The dashboard of a real server, while it works. Left out where there is no browser."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("playwright.sync_api", reason="needs playwright (extra browser)")

from dashboard_checks import check_detail, check_sorting, check_summary, check_table, total
from server import Server, wait_until
from test_dashboard import browser, visit  # noqa: F401

from vllm_kvcompress.bundled import MODEL_NAME

pytestmark = pytest.mark.slow

KEY = "sk-of-the-tests"
OPTIONS = [
    *("--kvcompress-budget", "256", "--kvcompress-interval", "32"),
    *("--kvcompress-pyramid-beta", "2", "--kvcompress-bands", "3"),
    *("--kv-cache-memory-bytes", str(128 << 20), "--max-model-len", "2048"),
]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    """Start servers one after another; what is left of them ends with the test."""
    servers: list[Server] = []

    def new(port: int | None = None) -> Server:
        server = Server(OPTIONS, tmp_path / f"server{len(servers)}.log", KEY, port)
        servers.append(server)
        server.wait_until_ready()
        return server

    yield new
    for server in servers:
        server.kill()


def test_while_sixteen_requests_run(
    start: Callable[..., Server],
    visit: Callable,  # noqa: F811
) -> None:
    server = start()
    dashboard = visit(server.url, KEY)
    dashboard.open()
    client = server.client()

    def ask(number: int) -> None:
        client.completions.create(
            model=MODEL_NAME,
            prompt=[100 + (number * 31 + i) % 900 for i in range(400)],
            max_tokens=150,
            temperature=0,
            extra_body={
                "ignore_eos": True,
                "vllm_xargs": {"kvcompress_method": "streaming" if number % 4 else "knorm"},
            },
        )

    with ThreadPoolExecutor(16) as threads:
        asked = [threads.submit(ask, number) for number in range(16)]
        assert wait_until(lambda: len(dashboard.answers("/requests")[-1]["requests"]) == 16, 60)
        first = dashboard.freeze()
        assert total(first, "requests", "running") > 0
        check_summary(dashboard, first)
        check_table(dashboard)
        check_sorting(dashboard)
        running = next(
            each["id"]
            for each in dashboard.answers("/requests")[-1]["requests"]
            if each["state"] == "running"
        )
        dashboard.page.get_by_role("link", name=running).click()
        dashboard.resume()
        check_detail(dashboard, running)
        dashboard.page.go_back()
        for each in asked:
            each.result()

    last = dashboard.freeze()
    check_summary(dashboard, last)
    check_table(dashboard)
    assert total(last, "totals", "output_tokens") == 16 * 150
    assert total(last, "bytes_held") == 0
    assert {row[1] for row in dashboard.rows()} == {"finished, length"}
    assert {row[2] for row in dashboard.rows()} == {"knorm", "streaming"}
    dashboard.resume()

    server.stop()
    dashboard.wait_for("gone")
    start(server.port)
    dashboard.wait_for("live", timeout=60_000)
    check_summary(dashboard, dashboard.freeze())
