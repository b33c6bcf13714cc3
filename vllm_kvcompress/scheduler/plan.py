"""What the scheduler tells the workers to do with a request's blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_kvcompress.levels import Round

PLANS_ATTRIBUTE = "kvcompress_plans"
"""Attribute of vLLM's ``SchedulerOutput`` that carries a step's plans to the workers."""


@dataclass(slots=True)
class CompactionPlan:
    """One compaction of one request in one KV cache group.

    The tokens in ``sources`` are reduced to those that fit ``destinations``; a
    destination may be one of the sources. The request's block table row then reads, from
    index ``row_start``, ``row_ids``.

    Methods that merge pool the first ``pooled`` sources, and after them the tokens that
    ranking leaves over, by ``rounds``; the blocks ``outputs`` of these fill the first
    destinations. The other sources are ranked, and the best tokens fill the other
    destinations. Methods that only evict rank all sources and pool nothing.

    Attributes
    ----------
    request_id : str
    group : int
        KV cache group.
    position : int
        Tokens of the request computed so far.
    sources : list of int
        Blocks to read, in age order, all full.
    destinations : list of int
        Blocks to write, in age order.
    row_start : int
        First entry of the row that changes.
    row_ids : list of int
        New entries of the row from ``row_start`` on; 0 is the null block.
    holes : int
        Null blocks at the start of the row from now on.
    removed : int
        Blocks that the request gave up.
    method : str
        Method of the request.
    sinks : int
        First tokens of the ranked sources that stay whatever their score.
    pooled : int
        How many of the sources are pooled without ranking.
    rounds : list of Round
        Merges, with blocks numbered as in :class:`~vllm_kvcompress.levels.Round`: pooled
        sources, then the blocks that ranking leaves over, then those made.
    outputs : list of int
        Blocks, by these numbers, that are written, in the order of the destinations.
    exact : int
        Last sources, in blocks, that hold consecutive tokens as they were computed; 0 where
        nothing is ranked, since all spans are known then.
    end : int
        Position after the last token of the sources.
    """

    request_id: str
    group: int
    position: int
    sources: list[int]
    destinations: list[int]
    row_start: int
    row_ids: list[int]
    holes: int
    removed: int
    method: str
    sinks: int
    pooled: int = 0
    rounds: list[Round] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)
    exact: int = 0
    end: int = 0
