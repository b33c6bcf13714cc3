"""Checks of the dashboard that hold against any server.

What they compare the page with is not asked for separately but recorded inside the page, as the
page received it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from decimal import ROUND_HALF_UP, Decimal
from typing import Any

from dashboard_driver import Dashboard, plain
from playwright.sync_api import expect

UNKNOWN = "–"


def rounded(value: float, digits: int) -> str:
    """Significant digits, ties away from zero as in JavaScript."""
    if value == 0:
        return f"{0:.{digits - 1}f}"
    last = math.floor(math.log10(abs(value))) - digits + 1
    step = Decimal(1).scaleb(last)
    return f"{Decimal(value).quantize(step, ROUND_HALF_UP):f}"


def size(value: float | None) -> str:
    """Bytes as the page writes them."""
    if value is None:
        return UNKNOWN
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):  # noqa: B007
        if abs(value) < 1023.5:
            break
        value /= 1024
    if unit == "B" or value >= 999.5:
        return f"{count(value)} {unit}"
    return f"{rounded(value, 3)} {unit}"


def count(value: float | None) -> str:
    """A count as the page writes it."""
    if value is None:
        return UNKNOWN
    return f"{int(Decimal(value).quantize(Decimal(1), ROUND_HALF_UP)):,}"


def fixed(value: float | None) -> str:
    """Two decimals."""
    if value is None:
        return UNKNOWN
    return str(Decimal(value).quantize(Decimal("0.01"), ROUND_HALF_UP))


def whole_seconds(request: dict[str, Any]) -> float | None:
    parts = [request[f"{name}_seconds"] for name in ("queue", "prefill", "decode")]
    known = [part for part in parts if part is not None]
    return sum(known) if known else None


def state_text(request: dict[str, Any]) -> str:
    if request["state"] == "finished":
        reason = {"abort": "aborted"}.get(request["finish_reason"], request["finish_reason"])
        return f"finished, {reason}" if reason else "finished"
    preempted = request["state"] == "waiting" and request["preemptions"]
    return "waiting, preempted" if preempted else request["state"]


COLUMNS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "Request": lambda request: request["id"],
    "State": state_text,
    "Method": lambda request: request["method"],
    "KV now": lambda request: request["bytes_held"],
    "KV peak": lambda request: request["bytes_peak"],
    "Peak if uncompressed": lambda request: request["bytes_uncompressed_peak"],
    "Ratio": lambda request: request["ratio"],
    "Compactions": lambda request: request["compactions"],
    "Prompt tokens": lambda request: request["prompt_tokens"],
    "Output tokens": lambda request: request["output_tokens"],
    "Arrived": lambda request: request["arrival"],
    "Time": whole_seconds,
}
"""What each column is sorted by, by its heading."""

SHOWN: dict[str, Callable[[Any], str]] = {
    **dict.fromkeys(["Request", "State", "Method"], str),
    **dict.fromkeys(["KV now", "KV peak", "Peak if uncompressed"], size),
    **dict.fromkeys(["Compactions", "Prompt tokens", "Output tokens"], count),
    "Ratio": fixed,
}
"""How a column's value is written; times depend on the zone and are left out."""


def total(summary: dict[str, Any], *path: str) -> Any:
    """A number of a summary, added up over the engines."""
    values = []
    for value in summary["engines"]:
        for name in path:
            value = value[name]
        values.append(value)
    return sum(values)


def check_summary(dashboard: Dashboard, summary: dict[str, Any]) -> None:
    """Cards and counters agree with the summary that is drawn."""
    held, stock = total(summary, "bytes_held"), total(summary, "bytes_uncompressed")
    pool = total(summary, "pool", "bytes")
    memory = dashboard.card("Memory of the KV cache")
    assert f"{size(held)} of {size(pool)} held by running requests" in memory
    assert f"stock vLLM would hold {size(stock)}" in memory
    assert f"Cached, unused {size(total(summary, 'pool', 'cached_bytes'))}" in memory
    saved = dashboard.card("Saved share")
    if stock:
        assert f"{size(stock - held)} less" in saved and f"{fixed(stock / held)} ×" in saved
    else:
        assert "No request is running" in saved
    requests = dashboard.card("Requests")
    for name in ("running", "waiting", "preempted"):
        assert f"{name.capitalize()} {total(summary, 'requests', name)}" in requests
    facts = dashboard.facts("[aria-labelledby=since]")
    for label, name in (
        ("Prompt tokens", "prompt_tokens"),
        ("Output tokens", "output_tokens"),
        ("Tokens removed", "tokens_removed"),
        ("Tokens merged", "tokens_merged"),
        ("Pages freed", "blocks_freed"),
        ("Preemptions", "preemptions"),
    ):
        assert facts[label] == count(total(summary, "totals", name)), label


def check_table(dashboard: Dashboard) -> None:
    """The frozen table agrees with the requests that it was drawn from."""
    requests = {each["id"]: each for each in dashboard.answers("/requests")[-1]["requests"]}
    headings = dashboard.headings()
    rows = dashboard.rows()
    assert sorted(row[0] for row in rows) == sorted(requests)
    for row in rows:
        request = requests[row[0]]
        for heading, cell in zip(headings, row, strict=True):
            if heading in SHOWN:
                expected = SHOWN[heading](COLUMNS[heading](request))
                assert cell == expected, (row[0], heading)


def check_sorting(dashboard: Dashboard) -> None:
    """Each heading sorts the frozen table, either way, what is unknown last."""
    requests = {each["id"]: each for each in dashboard.answers("/requests")[-1]["requests"]}
    for heading in [name for name in dashboard.headings() if name in COLUMNS]:
        button = dashboard.page.locator("#table thead button").nth(
            [
                plain(text)
                for text in dashboard.page.locator("#table thead button").all_text_contents()
            ].index(heading)
        )
        head = button.locator("..")
        seen = set()
        for _ in range(2):
            button.click()
            direction = head.get_attribute("aria-sort")
            assert direction is not None
            seen.add(direction)
            values = [COLUMNS[heading](requests[name]) for name in dashboard.ids()]
            known = [value for value in values if value is not None]
            assert len(values) == len(requests)
            assert values == known + [None] * (len(values) - len(known)), heading
            assert known == sorted(known, reverse=direction == "descending"), heading
        assert seen == {"ascending", "descending"}
        marked = dashboard.page.locator("#table thead [aria-sort]")
        assert marked.count() == 1


def check_detail(dashboard: Dashboard, request_id: str) -> None:
    """The view of one request, opened and frozen, agrees with its JSON."""
    page = dashboard.page
    expect(page.locator("#detail h2")).to_have_text(request_id)
    dashboard.freeze()
    request = dashboard.answers(f"/requests/{request_id}")[-1]
    assert plain(page.locator("#detail article > .sub").inner_text()).startswith(
        state_text(request)
    )
    facts = dashboard.facts("#detail")
    assert facts["KV now"] == size(request["bytes_held"])
    assert facts["KV peak"] == size(request["bytes_peak"])
    assert facts["Uncompressed peak"] == size(request["bytes_uncompressed_peak"])
    assert facts["Compactions"] == count(request["compactions"])
    assert facts["Output tokens"] == count(request["output_tokens"])
    for name, value in request["settings"].items():
        assert facts[name] == ("not set" if value is None else str(value).lower()), name
    names = ("layers", "group", "blocks", "tokens_kept", "tokens_removed", "tokens_merged")
    assert [row[1:7] for row in dashboard.rows("#bands")] == [
        [count(band[name]) for name in names] for band in request["bands"]
    ]
    pages = dashboard.card("Pages per band")
    for band in {band["band"] for band in request["bands"]} - {-1}:
        blocks = sum(each["blocks"] for each in request["bands"] if each["band"] == band)
        assert f"Band {band} {count(blocks)}" in pages
    dashboard.resume()
