"""Room that compressed requests will yet take, which admission leaves them."""

from __future__ import annotations

from collections.abc import Iterable

from vllm.v1.request import Request

from vllm_kvcompress.scheduler.state import RequestState


def promised_blocks(
    states: Iterable[tuple[Request, RequestState, int]], groups: int, during_prefill: bool
) -> int:
    """Blocks, in all groups, that requests will yet take before they give some back.

    Who admits without leaving them room admits to preempt: a preempted request replays
    its prompt, which costs more than a smaller batch. Requests that have not compacted
    count as in stock vLLM, not at all, but for prompts in ``during_prefill``: their
    chunks end at compactions, so that several may be under way at once.

    Parameters
    ----------
    states : iterable of (Request, RequestState, int)
        Requests that hold blocks, and the entries of their rows: as many in every group.
    groups : int
    during_prefill : bool
    """
    blocks = 0
    for request, state, entries in states:
        trajectory, length = state.trajectory, request.num_tokens
        if during_prefill and request.num_computed_tokens < length - 1:
            blocks += missing_to_peak(state, length, entries)
        elif state.started:
            final = request.num_prompt_tokens + request.max_tokens
            ahead = -(-min(trajectory.due, final) // trajectory.schedule.block_size)
            blocks += groups * max(0, ahead - entries)
    return blocks


def missing_to_peak(state: RequestState, length: int, entries: int) -> int:
    """Blocks between what a request holds and the most it will hold, in all groups."""
    trajectory, blocks = state.trajectory, 0
    for groups in trajectory.schedule.every_kind:
        held = entries - trajectory.removed[groups[0]]
        blocks += len(groups) * max(0, trajectory.peak_blocks(groups[0], length) - held)
    return blocks
