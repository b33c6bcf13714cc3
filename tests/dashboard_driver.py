"""Driving the dashboard in a browser: one page of one server, the stub's or a real one's."""

from __future__ import annotations

from typing import Any
from urllib.parse import urlsplit

from playwright.sync_api import BrowserContext, Page, expect

RECORD = """
window.answers = [];
const json = Response.prototype.json;
Response.prototype.json = async function () {
  const value = await json.call(this);
  const path = decodeURIComponent(new URL(this.url).pathname);
  window.answers.push({ path, value });
  if (window.answers.length > 400) window.answers.shift();
  return value;
};
"""


def plain(text: str) -> str:
    """Without no-break spaces and soft hyphens."""
    return " ".join(text.replace("\u00ad", "").split())


class Dashboard:
    """The page of one server in one browser context.

    Attributes
    ----------
    page : Page
    problems : list of str
        Errors of the console and of scripts, and requests to another host than the server.
    """

    def __init__(self, context: BrowserContext, url: str, api_key: str | None = None) -> None:
        self.url = url
        self.api_key = api_key
        self.page: Page = context.new_page()
        self.page.set_default_timeout(10_000)
        self.page.add_init_script(RECORD)
        self.problems: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", self._console)
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("dialog", lambda dialog: self.problems.append(f"dialog {dialog.message}"))
        self.page.on("request", self._request)

    def _console(self, message: Any) -> None:
        # The browser itself notes every failed request; that a state follows is checked elsewhere.
        if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
            self.problems.append(message.text)

    def _request(self, request: Any) -> None:
        self.asked.append(request.url)
        if urlsplit(request.url).netloc != urlsplit(self.url).netloc:
            self.problems.append(f"request to {request.url}")

    def open(self, path: str = "", wait_for: str = "live") -> None:
        """Load the page, enter the key if it asks for one, and wait for a state."""
        self.page.goto(f"{self.url}/kvcompress{path}")
        if self.api_key:
            self.enter_key(self.api_key)
        self.wait_for(wait_for)

    def wait_for(self, state: str, timeout: float = 25_000) -> None:
        status = self.page.locator("#status")
        expect(status).to_have_attribute("data-state", state, timeout=timeout)

    def enter_key(self, key: str) -> None:
        self.page.get_by_label("API key of this server").fill(key)
        self.page.get_by_role("button", name="Connect").click()

    def answers(self, end: str) -> list[Any]:
        """Values the page received from addresses with this end, oldest first."""
        return self.page.evaluate(
            "end => answers.filter(({path}) => path.endsWith(end)).map(({value}) => value)", end
        )

    @property
    def drawn(self) -> float:
        """Time of the summary that is drawn."""
        return float(self.page.locator("#main").get_attribute("data-time") or 0)

    def wait_until_drawn(self, after: float) -> None:
        """Wait for a later summary than this to be drawn."""
        self.page.wait_for_function(
            "after => Number(document.getElementById('main').dataset.time) > after",
            arg=after,
            polling=20,
        )

    def freeze(self) -> dict[str, Any]:
        """Pause the page between two rounds; return the summary that is drawn."""
        button = self.page.locator("#pause")
        for _ in range(5):
            self.wait_until_drawn(self.drawn)
            button.click()
            self.wait_for("paused")
            summary = self.answers("/summary")[-1]
            if summary["time"] == self.drawn:
                return summary
            button.click()
        raise AssertionError("the page was never between two rounds")

    def resume(self) -> None:
        self.page.get_by_role("button", name="Resume").click()
        self.wait_for("live")

    def card(self, title: str) -> str:
        """Text of a chart's card."""
        return plain(self.page.locator(f'figure[aria-label="{title}"]').inner_text())

    def facts(self, within: str) -> dict[str, str]:
        """The description list inside an element."""
        pairs = self.page.locator(f"{within} dl > div").evaluate_all(
            "divs => divs.map(d => [d.children[0].textContent, d.children[1].textContent])"
        )
        return {plain(name): plain(value) for name, value in pairs}

    def headings(self) -> list[str]:
        buttons = self.page.locator("#table thead th:not([hidden]) button")
        return [plain(text) for text in buttons.all_text_contents()]

    def rows(self, table: str = "#table") -> list[list[str]]:
        """Visible cells of a table's body."""
        rows = self.page.locator(f"{table} tbody tr").evaluate_all(
            "rows => rows.map(r => [...r.cells].filter(c => !c.hidden).map(c => c.textContent))"
        )
        return [[plain(cell) for cell in row] for row in rows]

    def ids(self) -> list[str]:
        return [row[0] for row in self.rows()]

    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return self.page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
