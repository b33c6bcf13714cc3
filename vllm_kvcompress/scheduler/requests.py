"""When each request compacts, by its own settings; the same in API process and engine core."""

from __future__ import annotations

import functools
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from vllm_kvcompress.bands import Band, plan_bands
from vllm_kvcompress.limits import Limits
from vllm_kvcompress.request import PREFIX, asked, refusal
from vllm_kvcompress.scheduler.schedule import Schedule
from vllm_kvcompress.scheduler.trajectory import Trajectory
from vllm_kvcompress.settings import Settings, SettingsError

DISTINCT = 256
"""Different settings whose limits are remembered."""


class RequestSchedules:
    """Makes trajectories from what requests ask for.

    Parameters
    ----------
    server : Settings
        The server's.
    bands : sequence of int
        Band of each KV cache group; -1 for groups that keep every token.
    num_layers, block_size, max_model_len, kv_heads : int
        Of the model and the engine; KV heads are those of a layer.
    """

    def __init__(
        self,
        server: Settings,
        bands: Sequence[int],
        num_layers: int,
        block_size: int,
        max_model_len: int,
        kv_heads: int = 1,
    ) -> None:
        self.server = server
        self.bands = tuple(bands)
        self.num_layers = num_layers
        self.block_size = block_size
        self.max_model_len = max_model_len
        self.kv_heads = kv_heads
        self.schedule = functools.lru_cache(maxsize=DISTINCT)(self._schedule)

    def trajectory(self, prompt_tokens: int, extra_args: Any) -> Trajectory:
        """Trajectory of a request.

        Parameters
        ----------
        prompt_tokens : int
        extra_args : Any
            Of its sampling parameters.

        Raises
        ------
        SettingsError
            One sentence for the client, if it asks for something that cannot be.
        """
        settings, context = asked(self.server, extra_args)
        if context is not None and context > prompt_tokens:
            raise refusal(
                "context_tokens",
                context,
                f"the prompt has {prompt_tokens} tokens, and the context is a part of it",
            )
        return Trajectory(self.schedule(settings), prompt_tokens, context)

    def most_blocks(self, trajectory: Trajectory, tokens: int) -> int:
        """Most blocks that a request holds at once, in all groups, on its way to so many tokens."""
        tokens = min(tokens, self.max_model_len)
        return sum(trajectory.peak_blocks(group, tokens) for group in range(len(self.bands)))

    def _schedule(self, settings: Settings) -> Schedule:
        limits: list[Limits | None] = [None] * len(self.bands)
        if settings.enabled:
            by_band = self._limits(settings)
            limits = [by_band.get(band) for band in self.bands]
        return Schedule.of(settings, limits, self.block_size, self.max_model_len)

    def _limits(self, settings: Settings) -> dict[int, Limits | None]:
        try:
            bands = self._bands(settings)
        except SettingsError:
            # Bands and skipped layers are the server's, which started: it is the budget.
            raise refusal(
                "budget",
                settings.token_budget,
                f"with {PREFIX}method={settings.method} it must be at least "
                f"{self._least_budget(settings)}, for the sinks, recent_tokens and what "
                "else the server's settings need room for in every band",
            ) from None
        return {band.index: band.limits for band in bands}

    def _least_budget(self, settings: Settings) -> int:
        """Smallest budget, in whole blocks, that leaves every band room."""
        high = -(-self.max_model_len // self.block_size)
        while not self._has_room(settings, high):
            high *= 2
        has_room = functools.partial(self._has_room, settings)
        return (1 + bisect_left(range(1, high), True, key=has_room)) * self.block_size

    def _has_room(self, settings: Settings, blocks: int) -> bool:
        budget = settings.model_copy(update={"budget": blocks * self.block_size})
        try:
            self._bands(budget)
        except SettingsError:
            return False
        return True

    def _bands(self, settings: Settings) -> list[Band]:
        return plan_bands(
            settings,
            self.num_layers,
            self.block_size,
            longest=self.max_model_len,
            kv_heads=self.kv_heads,
        )
