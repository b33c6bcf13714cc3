"""What the scheduler tells the workers to do with a request's blocks."""

from __future__ import annotations

from dataclasses import dataclass

PLANS_ATTRIBUTE = "kvcompress_plans"
"""Attribute of vLLM's ``SchedulerOutput`` that carries a step's plans to the workers."""


@dataclass(slots=True)
class CompactionPlan:
    """One compaction of one request in one KV cache group.

    The tokens in ``sources`` are reduced to those that fit ``destinations``; a
    destination may be one of the sources. The request's block table row then reads, from
    index ``row_start``, ``row_ids``.

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
    """

    request_id: str
    group: int
    position: int
    sources: list[int]
    destinations: list[int]
    row_start: int
    row_ids: list[int]
    holes: int
