"""The dashboard in a real, headless Chromium, against the stub of its endpoints.

Left out where there is no browser: the Python package playwright (extra ``browser``) and Debian's
chromium, or one named by ``CHROMIUM``.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api", reason="needs playwright (extra browser)")
CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
if CHROMIUM is None:
    pytest.skip("needs a browser: apt-get install chromium", allow_module_level=True)

# ruff: noqa: E402
from dashboard_checks import (
    check_detail,
    check_sorting,
    check_summary,
    check_table,
    count,
    size,
    total,
)
from dashboard_driver import Dashboard
from dashboard_stub import Stub, StubServer
from playwright.sync_api import Browser, BrowserContext, expect, sync_playwright

from bench.screenshot import FLAGS

CSP = "default-src 'self'"


# Of the module, not the session: while Playwright runs, this thread has a running event loop,
# and `asyncio.run` in the tests of another file would be refused.
@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def serve() -> Iterator[Callable[..., StubServer]]:
    """Start stubs; they end with the test."""
    servers: list[StubServer] = []

    def start(**knobs: Any) -> StubServer:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        server = StubServer(Stub(**knobs), port)
        server.start()
        servers.append(server)
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Dashboard]]:
    """Make dashboards in contexts of their own; at the end none may have had a problem."""
    contexts: list[BrowserContext] = []
    dashboards: list[Dashboard] = []

    def make(url: str, api_key: str | None = None, **options: Any) -> Dashboard:
        contexts.append(browser.new_context(viewport={"width": 1280, "height": 900}, **options))
        dashboards.append(Dashboard(contexts[-1], url, api_key))
        return dashboards[-1]

    yield make
    problems = [problem for dashboard in dashboards for problem in dashboard.problems]
    for context in contexts:
        context.close()
    assert not problems


@pytest.fixture
def live(serve: Callable[..., StubServer], visit: Callable[..., Dashboard]) -> Dashboard:
    """A dashboard of a plain stub, opened."""
    dashboard = visit(serve().url)
    dashboard.open()
    return dashboard


# Numbers


def test_numbers_move_and_agree(live: Dashboard) -> None:
    first = live.freeze()
    check_summary(live, first)
    check_table(live)
    live.resume()
    live.page.wait_for_timeout(2500)
    second = live.freeze()
    check_summary(live, second)
    check_table(live)
    assert second["time"] >= first["time"] + 2
    assert total(second, "totals", "output_tokens") > total(first, "totals", "output_tokens")


def test_rates_are_means_of_five_seconds(live: Dashboard) -> None:
    live.page.wait_for_timeout(7500)
    last = live.freeze()
    before = next(each for each in live.answers("/summary") if each["time"] >= last["time"] - 5.5)
    seconds = last["time"] - before["time"]
    assert 3.9 < seconds <= 5.5

    def rate(name: str) -> float:
        counters = [each["engines"][0]["totals"][name] for each in (before, last)]
        return (counters[1] - counters[0]) / seconds

    shown = live.page.evaluate(
        "async rates => { const {number} = await import('/kvcompress/format.js');"
        " return rates.map(number); }",
        [rate("output_tokens"), rate("prompt_tokens")],
    )
    assert f"{shown[0]} output tokens/s" in live.card("Tokens per second")
    assert f"{shown[1]} prompt tokens/s" in live.card("Tokens per second")
    totals = [each["engines"][0]["totals"]["compactions"] for each in (before, last)]
    compactions = (sum(totals[1].values()) - sum(totals[0].values())) / seconds
    assert f"{compactions:.1f}".rstrip("0").rstrip(".") in live.card("Compactions")


def test_engines_are_added_up_or_chosen(
    serve: Callable[..., StubServer], visit: Callable[..., Dashboard]
) -> None:
    dashboard = visit(serve(engines=2).url)
    dashboard.open()
    summary = dashboard.freeze()
    check_summary(dashboard, summary)
    before = dashboard.drawn
    dashboard.page.get_by_label("Engine").select_option("1")
    # Also a paused page asks once more when something else is to be shown.
    dashboard.wait_until_drawn(before)
    summary = dashboard.answers("/summary")[-1]
    one = {"time": summary["time"], "engines": [summary["engines"][1]]}
    check_summary(dashboard, one)
    engines = {row[dashboard.headings().index("Engine")] for row in dashboard.rows()}
    assert engines == {"1"}


def test_one_engine_needs_no_choice(live: Dashboard) -> None:
    expect(live.page.get_by_label("Engine")).to_be_hidden()
    assert "Engine" not in live.headings()


# The table


def test_every_column_sorts(live: Dashboard) -> None:
    live.freeze()
    check_sorting(live)


def test_filters(live: Dashboard) -> None:
    page = live.page
    page.get_by_label("Method").select_option("merge")
    live.freeze()
    requests = live.answers("/requests")[-1]["requests"]
    merging = {each["id"] for each in requests if each["method"] == "merge"}
    assert set(live.ids()) == merging
    said = f"{len(merging)} of {count(len(requests))} shown"
    expect(page.locator("#shown")).to_have_text(said)
    wanted = sorted(merging)[0][-5:].upper()
    page.get_by_label("Id").fill(wanted)
    assert set(live.ids()) == {name for name in merging if wanted.lower() in name}
    page.get_by_label("Id").fill("no such request")
    expect(page.get_by_text("No request matches the filter.")).to_be_visible()
    page.get_by_role("button", name="Clear the filter").click()
    assert len(live.ids()) >= len(requests)
    live.resume()
    # The state is the server's to filter: the bound is on what passes.
    page.get_by_label("State").select_option("finished")
    live.freeze()
    assert any("state=finished" in url for url in live.asked)
    assert {row[live.headings().index("State")].split(",")[0] for row in live.rows()} == {
        "finished"
    }


def test_more_requests_than_are_shown(
    serve: Callable[..., StubServer], visit: Callable[..., Dashboard]
) -> None:
    dashboard = visit(serve(warm=400.0).url)
    dashboard.open()
    dashboard.freeze()
    answer = dashboard.answers("/requests")[-1]
    assert len(dashboard.ids()) == 200 < answer["total"]
    expect(dashboard.page.locator("#shown")).to_have_text(
        f"newest 200 of {count(answer['total'])} shown"
    )


def test_bars_have_one_scale(live: Dashboard) -> None:
    live.freeze()
    requests = {each["id"]: each for each in live.answers("/requests")[-1]["requests"]}
    most = max(each["bytes_uncompressed_peak"] for each in requests.values())
    widths = live.page.locator("#table tbody tr").evaluate_all(
        "rows => rows.map(r => [r.dataset.id, ...['now', 'peak', 'uncompressed'].map("
        "name => r.querySelector('.bar .' + name).getBoundingClientRect().width"
        " / r.querySelector('.bar').getBoundingClientRect().width)])"
    )
    for name, *shares in widths:
        keys = ("bytes_held", "bytes_peak", "bytes_uncompressed_peak")
        assert shares == pytest.approx([requests[name][key] / most for key in keys], abs=0.02)


# One request


def test_into_a_request_and_back(live: Dashboard) -> None:
    page = live.page
    live.freeze()
    requests = live.answers("/requests")[-1]["requests"]
    name = next(each["id"] for each in requests if each["output_tokens"] > 20)
    live.resume()
    page.get_by_role("link", name=name).click()
    expect(page.locator("#detail h2")).to_be_focused()
    assert page.url.endswith(f"#/requests/{name}") and name in page.title()
    check_detail(live, name)
    page.go_back()
    expect(page.get_by_role("link", name=name)).to_be_focused()
    page.get_by_role("link", name=name).click()
    page.get_by_role("button", name="All requests").click()
    expect(page.locator("#table")).to_be_visible()
    assert page.title() == "KV cache compression"


def test_a_finished_request_by_its_address(live: Dashboard) -> None:
    live.page.get_by_label("State").select_option("finished")
    live.freeze()
    name = live.answers("/requests")[-1]["requests"][0]["id"]
    live.resume()
    live.page.goto("about:blank")
    live.open(f"#/requests/{name}")
    check_detail(live, name)
    live.page.keyboard.press("Escape")
    expect(live.page.locator("#table")).to_be_visible()


def test_an_unknown_request(live: Dashboard) -> None:
    live.open("#/requests/gone")
    expect(live.page.get_by_text("The server does not know this request.")).to_be_visible()
    assert live.page.locator("#detail h2").inner_text() == "gone"
    live.page.get_by_role("button", name="All requests").click()
    expect(live.page.locator("#table")).to_be_visible()


# States


def test_lost_and_found(serve: Callable[..., StubServer], visit: Callable[..., Dashboard]) -> None:
    server = serve()
    dashboard = visit(server.url)
    dashboard.open()
    dashboard.page.wait_for_timeout(2100)
    server.stop()
    dashboard.wait_for("gone")
    page = dashboard.page
    held = total(dashboard.answers("/summary")[-1], "bytes_held")
    expect(page.get_by_role("heading", name="The server does not answer")).to_be_visible()
    expect(page.locator(".notice")).to_contain_text("The numbers below are from")
    expect(page.get_by_role("status")).to_have_text("The server does not answer.")
    expect(page.locator("#main")).to_have_attribute("data-stale", "true")
    assert size(held) in dashboard.card("Memory of the KV cache") and dashboard.rows()
    # Ever more rarely: after 1, 2 and 4 seconds.
    asked = len(dashboard.asked)
    page.wait_for_timeout(6000)
    assert len(dashboard.asked) - asked <= 3 * 3
    server.start()
    dashboard.wait_for("live")
    expect(page.get_by_role("status")).to_have_text("The server answers again.")
    expect(page.locator("#main")).to_have_attribute("data-stale", "false")
    expect(page.locator(".notice")).to_have_count(0)
    check_summary(dashboard, dashboard.freeze())


def test_gone_from_the_start_then_tried_by_hand(
    serve: Callable[..., StubServer], visit: Callable[..., Dashboard]
) -> None:
    server = serve()
    dashboard = visit(server.url)
    no = {"error": {"message": "no compression here", "code": 503}}
    dashboard.page.route("**/v1/kvcompress/**", lambda route: route.fulfill(status=503, json=no))
    dashboard.open(wait_for="gone")
    expect(dashboard.page.locator(".notice")).to_contain_text(
        "HTTP status 503: no compression here"
    )
    expect(dashboard.page.locator("#overview")).to_be_hidden()
    dashboard.page.unroute_all()
    dashboard.page.get_by_role("button", name="Try now").click()
    dashboard.wait_for("live", 3000)


def test_the_key_is_asked_for_and_kept_in_memory(
    serve: Callable[..., StubServer], visit: Callable[..., Dashboard]
) -> None:
    key = "sk-only-in-memory"
    dashboard = visit(serve(api_key=key).url)
    dashboard.open(wait_for="unauthorised")
    page = dashboard.page
    expect(page.get_by_label("API key of this server")).to_be_focused()
    asked = len(dashboard.asked)
    page.wait_for_timeout(2500)
    assert len(dashboard.asked) == asked
    dashboard.enter_key("wrong")
    expect(page.get_by_text("The server refused this key.")).to_be_visible()
    dashboard.enter_key(key)
    dashboard.wait_for("live")
    check_summary(dashboard, dashboard.freeze())
    assert page.locator("#key").count() == 0
    kept = page.evaluate(
        "[JSON.stringify(localStorage), JSON.stringify(sessionStorage), "
        "document.cookie, location.href, document.documentElement.outerHTML]"
    )
    assert not [each for each in kept if key in each]
    assert not [url for url in dashboard.asked if key in url]
    page.reload()
    dashboard.wait_for("unauthorised")


def test_empty(serve: Callable[..., StubServer], visit: Callable[..., Dashboard]) -> None:
    server = serve(empty=True)
    dashboard = visit(server.url)
    dashboard.open()
    expect(dashboard.page.get_by_text("No requests yet.")).to_be_visible()
    expect(dashboard.page.locator("#table")).to_be_hidden()
    check_summary(dashboard, dashboard.freeze())
    dashboard.resume()
    server.stub.empty = False
    expect(dashboard.page.locator("#table")).to_be_visible()


def test_loading(serve: Callable[..., StubServer], visit: Callable[..., Dashboard]) -> None:
    dashboard = visit(serve(delay=0.7).url)
    dashboard.open(wait_for="loading")
    expect(dashboard.page.get_by_text("Waiting for the first answer")).to_be_visible()
    dashboard.wait_for("live")
    expect(dashboard.page.get_by_text("Waiting for the first answer")).to_have_count(0)


def test_no_plugin(serve: Callable[..., StubServer], visit: Callable[..., Dashboard]) -> None:
    server = serve(missing=True)
    dashboard = visit(server.url)
    dashboard.open(wait_for="missing")
    expect(dashboard.page.locator(".notice")).to_contain_text("the plugin is not loaded")
    server.stub.missing = False
    dashboard.wait_for("live")


# Polling


def test_once_a_second_and_not_while_hidden(live: Dashboard) -> None:
    page = live.page

    def asked() -> int:
        return sum(url.endswith("/summary") for url in live.asked)

    before = asked()
    page.wait_for_timeout(5000)
    assert 4 <= asked() - before <= 6
    show = "value => { Object.defineProperty(document, 'hidden', {value, configurable: true});"
    show += " document.dispatchEvent(new Event('visibilitychange')); }"
    page.evaluate(show, True)
    page.wait_for_timeout(100)
    before = asked()
    page.wait_for_timeout(2500)
    assert asked() == before
    page.evaluate(show, False)
    page.wait_for_timeout(500)
    assert asked() == before + 1


def test_samples_survive_a_restart_and_gaps(live: Dashboard) -> None:
    engine: dict[str, Any] = {"pool": {}, "requests": {}, "bytes_held": 1, "bytes_uncompressed": 4}

    def summary(time: float, *tokens: int | None) -> dict[str, Any]:
        engines = [
            {
                **engine,
                "engine": index,
                "time": time,
                "totals": {"output_tokens": value, "compactions": {}},
            }
            for index, value in enumerate(tokens)
        ]
        return {"time": time, "engines": engines}

    series = live.page.evaluate(
        "async summaries => { const {Samples} = await import('/kvcompress/samples.js');"
        " const samples = new Samples(); for (const each of summaries) samples.add(each);"
        " return samples.series(null); }",
        [
            *[summary(100, 10, 100), summary(101, 20, 103), summary(101, 99, 99)],
            *[summary(103, 40, 109), summary(104, 5, 112), summary(120, 8, None)],
        ],
    )
    # The repeated moment adds nothing; engine 0 starts anew at 104; a gap follows.
    assert series["time"] == [100, 101, 103, 104, 112, 120]
    assert series["outputTokens"] == [None, 13, 13, 3, None, pytest.approx(3 / 16)]
    assert series["saved"] == [0.75] * 4 + [None, 0.75]
    assert series["promptTokens"] == [None] * 6
    assert series["compactions"] == [None, 0, 0, 0, None, 0]


# For everyone


def test_dark_and_light(serve: Callable[..., StubServer], visit: Callable[..., Dashboard]) -> None:
    dashboard = visit(serve().url, color_scheme="dark")
    dashboard.open()
    page = dashboard.page

    def brightness() -> float:
        return page.evaluate(
            "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3)"
            ".reduce((a, b) => a + Number(b), 0) / 765"
        )

    # Colour of the chart's axis labels: what is drawn on the canvas follows the theme too.
    drawn = (
        "() => { const c = document.querySelector('.plot canvas');"
        " const d = c.getContext('2d').getImageData(0, 0, 60, c.height).data; let most = 0;"
        " for (let i = 0; i < d.length; i += 4) if (d[i + 3] > 200) most = Math.max(most, d[i]);"
        " return most; }"
    )
    assert brightness() < 0.2 and page.evaluate(drawn) > 140
    page.get_by_label("Theme").select_option("light")
    assert brightness() > 0.9
    page.wait_for_timeout(200)
    assert page.evaluate(drawn) < 140
    page.reload()
    dashboard.wait_for("live")
    assert brightness() > 0.9 and page.get_by_label("Theme").input_value() == "light"
    page.get_by_label("Theme").select_option("system")
    assert brightness() < 0.2
    # Chromium's advice on reading pixels more than once is for this test, not for the page.
    dashboard.problems = [each for each in dashboard.problems if "readback" not in each]


@pytest.mark.parametrize("width", [320, 360, 768])
def test_narrow_windows(
    width: int, serve: Callable[..., StubServer], visit: Callable[..., Dashboard]
) -> None:
    server = serve(engines=2, names={130: "chatcmpl-" + 40 * "x"}, model="m" * 90)
    dashboard = visit(server.url)
    dashboard.page.set_viewport_size({"width": width, "height": 740})
    dashboard.open()
    assert dashboard.overflow() == 0
    dashboard.page.locator("#table tbody a").first.click()
    expect(dashboard.page.locator("#bands")).to_be_visible()
    dashboard.page.wait_for_timeout(1200)
    assert dashboard.overflow() == 0


def test_keyboard_only(live: Dashboard) -> None:
    page = live.page

    def tab_to(selector: str, most: int = 60) -> None:
        for _ in range(most):
            page.keyboard.press("Tab")
            if page.evaluate("s => document.activeElement.matches(s)", selector):
                outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
                assert outline == "solid"
                return
        raise AssertionError(f"Tab never came to {selector}")

    tab_to(".skip", 1)
    page.keyboard.press("Enter")
    expect(page.locator("#main")).to_be_focused()
    tab_to("#table thead th:nth-child(2) button")
    page.keyboard.press("Enter")
    head = page.locator("#table thead th").nth(1)
    expect(head).to_have_attribute("aria-sort", "ascending")
    page.keyboard.press("Space")
    expect(head).to_have_attribute("aria-sort", "descending")
    tab_to("#table tbody a")
    name = page.evaluate("document.activeElement.textContent")
    page.keyboard.press("Enter")
    expect(page.locator("#detail h2")).to_have_text(name)
    expect(page.locator("#detail h2")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_role("link", name=name)).to_be_focused()


def test_focus_stays_while_rows_move(live: Dashboard) -> None:
    page = live.page
    live.freeze()
    link = page.locator("#table tbody a").nth(5)
    name = link.inner_text()
    link.focus()
    # By script: a real click would take the focus itself.
    page.evaluate("document.querySelector('#table [aria-sort] button').click()")
    assert live.ids().index(name) == len(live.ids()) - 6
    assert page.evaluate("document.activeElement.textContent") == name


def test_ids_are_only_text(
    serve: Callable[..., StubServer], visit: Callable[..., Dashboard]
) -> None:
    evil = "<img src=x onerror=alert(1)>/..?a#b%2f\"'&"
    server = serve(names={126: evil}, model="<b>model</b>")
    dashboard = visit(server.url)
    dashboard.open()
    page = dashboard.page
    expect(page.locator("#server")).to_contain_text("<b>model</b>")
    page.get_by_label("Id").fill("onerror")
    page.locator("#table tbody a").click()
    check_detail(dashboard, evil)
    assert page.locator("img, main b > *, #server b").count() == 0


def test_policy_and_files(live: Dashboard) -> None:
    answer = live.page.request.get(f"{live.url}/kvcompress")
    assert CSP in answer.headers["content-security-policy"]
    assert "unsafe" not in answer.headers["content-security-policy"]
    slashed = live.page.request.get(f"{live.url}/kvcompress/", max_redirects=0)
    assert slashed.status == 307 and slashed.headers["location"] == "../kvcompress"
    assert live.page.request.get(f"{live.url}/kvcompress/../page.py").status == 404
    assert live.page.request.get(f"{live.url}/kvcompress/vendor/LICENSE-uPlot.txt").ok
    # An inline script really is refused, so that the absence of complaints means something.
    live.page.evaluate(
        "() => { const s = document.createElement('script'); s.textContent = 'window.ran = 1';"
        " document.head.append(s); }"
    )
    assert live.page.evaluate("window.ran") is None
    assert any("Content Security Policy" in problem for problem in live.problems)
    live.problems.clear()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(
    scheme: str, serve: Callable[..., StubServer], visit: Callable[..., Dashboard]
) -> None:
    spec = find_spec("axe_playwright_python")
    if spec is None or spec.origin is None:
        pytest.skip("needs axe-core: axe-playwright-python (extra browser)")
    axe = (Path(spec.origin).parent / "axe.min.js").read_text()
    server = serve(engines=2, api_key="key", warm=20.0)
    dashboard = visit(server.url, color_scheme=scheme)
    page = dashboard.page

    def check(state: str) -> None:
        page.evaluate(axe)
        found = page.evaluate("axe.run()")
        assert len(found["passes"]) > 10
        assert not found["violations"], (state, json.dumps(found["violations"], indent=1)[:3000])

    dashboard.open(wait_for="unauthorised")
    check("unauthorised")
    dashboard.enter_key("key")
    dashboard.wait_for("live")
    dashboard.freeze()
    check("overview")
    dashboard.resume()
    page.locator("#table tbody a").last.click()
    expect(page.locator("#bands")).to_be_visible()
    check("detail")
    page.keyboard.press("Escape")
    server.stop()
    dashboard.wait_for("gone")
    check("gone")
