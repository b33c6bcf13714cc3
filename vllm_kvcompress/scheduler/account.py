"""The memory account of one request."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from vllm.v1.request import Request, RequestStatus

from vllm_kvcompress.scheduler.spec import band_of

MAX_MOMENTS = 64
"""Moments kept of one request; when there are more, every second one is forgotten."""


class Group(NamedTuple):
    """One KV cache group, as the accounts show it.

    Attributes
    ----------
    band : int
        -1 for layers that keep every token.
    layers : int
    """

    band: int
    layers: int

    @classmethod
    def of(cls, spec: object, layers: int) -> Group:
        """Group of so many layers with a KV cache spec."""
        return cls(band_of(spec), layers)


class Moment(NamedTuple):
    """What a request held at one time.

    Attributes
    ----------
    time : float
        Unix seconds.
    tokens : int
        Tokens computed so far.
    blocks : list of int
        Blocks held per group, shared ones counted whole.
    uncompressed : int
        Blocks that stock vLLM would hold in all groups, shared ones counted whole.
    """

    time: float
    tokens: int
    blocks: list[int]
    uncompressed: int

    def as_dict(self, block_bytes: int) -> dict[str, Any]:
        """As the JSON endpoint shows it."""
        return {
            "time": self.time,
            "tokens": self.tokens,
            "bytes_held": sum(self.blocks) * block_bytes,
            "bytes_uncompressed": self.uncompressed * block_bytes,
            "blocks": list(self.blocks),
        }


@dataclass(slots=True)
class Account:
    """What is remembered of one request beside what vLLM knows of it.

    Attributes
    ----------
    request : Request
    method : str
        ``none`` if nothing of it is to be compressed.
    settings : dict
        Settings in force for it.
    removed, merged : list of int
        Blocks given up per group since it was started or resumed, and how many of them by
        pooling.
    scheduled, first_token : float or None
        When it was first scheduled and put out its first token, in Unix seconds.
    cached_tokens : int or None
        Prompt tokens found in the prefix cache when it was first scheduled.
    compactions : int
        Of single groups, those repeated after a preemption included.
    compacted_at : int
        Tokens computed at the last of them; 0 if there was none since it was (re)started.
    peak, uncompressed_peak : int
        Most blocks held, and most that stock vLLM would have held, shared ones counted whole.
    moments : list of Moment
        Before and after its compactions, oldest first, and when it started and ended.
    """

    request: Request
    method: str
    settings: dict[str, Any]
    removed: list[int]
    merged: list[int]
    scheduled: float | None = None
    first_token: float | None = None
    cached_tokens: int | None = None
    compactions: int = 0
    compacted_at: int = 0
    peak: int = 0
    uncompressed_peak: int = 0
    moments: list[Moment] = field(default_factory=list)

    def moment(self, now: float, lengths: Sequence[int]) -> Moment:
        """What the request holds now.

        Parameters
        ----------
        now : float
            Unix seconds.
        lengths : sequence of int
            Entries of its rows, per group: a row keeps its logical length.
        """
        blocks = [length - gone for length, gone in zip(lengths, self.removed, strict=True)]
        return Moment(now, self.request.num_computed_tokens, blocks, sum(lengths))

    def note(self, moment: Moment) -> None:
        """Remember a moment, and that it was the highest if it was."""
        self.peak = max(self.peak, sum(moment.blocks))
        self.uncompressed_peak = max(self.uncompressed_peak, moment.uncompressed)
        if len(self.moments) >= MAX_MOMENTS:
            del self.moments[1::2]
        self.moments.append(moment)

    def report(
        self, now: Moment, shares: Sequence[float], groups: Sequence[Group], block: tuple[int, int]
    ) -> dict[str, Any]:
        """As the JSON endpoint shows it.

        Parameters
        ----------
        now : Moment
        shares : sequence of float
            Blocks charged per group: one that n requests hold counts 1/n.
        groups : sequence of Group
        block : tuple of int
            Size of a block in tokens and in bytes.
        """
        request, (size, block_bytes) = self.request, block
        held = sum(shares)
        # What was given up counts whole, though stock vLLM may have shared some of it.
        uncompressed = held + sum(self.removed)
        finished = request.is_finished()
        began, started, ended = self.first_token, self.scheduled, now.time
        arrival = request.arrival_time
        return {
            "id": request.request_id,
            "state": state_of(request),
            "finish_reason": str(request.get_finished_reason()) if finished else None,
            "method": self.method,
            "settings": self.settings,
            "arrival": arrival,
            "queue_seconds": max(0.0, (started or ended) - arrival),
            "prefill_seconds": None if started is None else (began or ended) - started,
            "decode_seconds": None if began is None else ended - began,
            "prompt_tokens": request.num_prompt_tokens,
            "output_tokens": request.num_output_tokens,
            "cached_tokens": self.cached_tokens,
            "preemptions": request.num_preemptions,
            "compactions": self.compactions,
            "bytes_held": round(held * block_bytes),
            "bytes_peak": max(self.peak, sum(now.blocks)) * block_bytes,
            "bytes_uncompressed": round(uncompressed * block_bytes),
            "bytes_uncompressed_peak": max(self.uncompressed_peak, now.uncompressed) * block_bytes,
            "ratio": uncompressed / held if held else None,
            "bands": [
                {
                    "band": group.band,
                    "group": index,
                    "layers": group.layers,
                    "blocks": blocks,
                    "tokens_kept": max(0, now.tokens - gone * size) if blocks else 0,
                    "tokens_removed": (gone - merged) * size,
                    "tokens_merged": merged * size,
                }
                for index, (group, blocks, gone, merged) in enumerate(
                    zip(groups, now.blocks, self.removed, self.merged, strict=True)
                )
            ],
        }


def state_of(request: Request) -> str:
    """``waiting``, ``running`` or ``finished``; a preempted request waits."""
    if request.is_finished():
        return "finished"
    return "running" if request.status == RequestStatus.RUNNING else "waiting"
