"""Snapshots of all engines, fetched at most once a second however many ask."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

Fetch = Callable[[Mapping[int, int], Sequence[str]], Awaitable[Sequence[dict[str, Any]]]]
"""From closings by engine and wanted request ids to the snapshots of all engines."""

INTERVAL = 1.0
"""Seconds between two calls to the engines."""

PATIENCE = 2.0
"""Seconds to wait for engines in the middle of a long step before the last answer is shown."""

WANTED_SECONDS = 5.0
"""How long after the last question for it a request's history is fetched along."""

MAX_WANTED = 16
"""Requests whose history is fetched along, the latest asked for."""


class NoSnapshotError(Exception):
    """The engines did not answer; the message is one sentence for the user."""


class Snapshots:
    """The latest snapshot of every engine, and the finished requests they told of.

    Parameters
    ----------
    fetch : Fetch
        Asks the engines.
    finished : int
        Finished requests to keep per engine.
    interval, patience : float
        Seconds.
    """

    def __init__(
        self,
        fetch: Fetch,
        finished: int,
        interval: float = INTERVAL,
        patience: float = PATIENCE,
    ) -> None:
        self.engines: dict[int, dict[str, Any]] = {}
        self.finished: dict[int, deque[dict[str, Any]]] = {}
        self.rendered: dict[Any, bytes] = {}
        """Answers made from the present snapshot, so that each is made once."""
        self._fetch, self._keep = fetch, finished
        self._interval, self._patience = interval, patience
        self._taken = -interval
        self._wanted: dict[str, float] = {}
        self._included: frozenset[str] = frozenset()
        self._task: asyncio.Task[None] | None = None

    async def refresh(self, wanted: str | None = None) -> None:
        """Make sure that the snapshot is not older than the interval.

        If the engines take longer than one's patience, the last snapshot stays.

        Parameters
        ----------
        wanted : str or None
            A request whose history must be in it.

        Raises
        ------
        NoSnapshotError
            If there is none yet, or the engines are gone.
        """
        if wanted is not None:
            self._want(wanted)
        has_it = wanted is None or wanted in self._included
        if has_it and time.monotonic() - self._taken < self._interval:
            return
        if self._task is None:
            self._task = asyncio.create_task(self._run())
        done, _ = await asyncio.wait({self._task}, timeout=self._patience)
        for task in done:
            if (error := task.exception()) is not None:
                raise NoSnapshotError("kvcompress: the engine does not answer.") from error
        if not self.engines:
            raise NoSnapshotError("kvcompress: the engine is busy; try again in a moment.")

    def _want(self, request_id: str) -> None:
        now = time.monotonic()
        self._wanted.pop(request_id, None)
        self._wanted[request_id] = now
        recent = [(i, t) for i, t in self._wanted.items() if now - t < WANTED_SECONDS]
        self._wanted = dict(recent[-MAX_WANTED:])

    async def _run(self) -> None:
        try:
            await asyncio.sleep(self._taken + self._interval - time.monotonic())
            wanted = list(self._wanted)
            closings = {engine: found["closings"] for engine, found in self.engines.items()}
            answers = await self._fetch(closings, wanted)
            for answer in answers:
                self._take(answer)
            self._included = frozenset(wanted)
            self._taken = time.monotonic()
            self.rendered.clear()
        finally:
            self._task = None

    def _take(self, answer: dict[str, Any]) -> None:
        engine = answer["engine"]
        for report in (*answer["live"], *answer["closed"]):
            report["engine"] = engine
        finished = self.finished.setdefault(engine, deque(maxlen=self._keep))
        finished.extend(reversed(answer.pop("closed")))
        self.engines[engine] = answer
