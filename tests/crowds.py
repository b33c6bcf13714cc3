"""Requests together, preempted and replayed in a small pool, against each of them alone."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import engines

FLIPS = 2
"""So many requests of a large crowd may go another way alone, and one in twelve of a small one:
where two tokens are nearly equally likely, rounding in another batch may choose the other."""


def positions(engine: engines.Engine) -> set[tuple[int, int]]:
    """Where requests were compacted: group, and tokens computed."""
    return {(plan.group, plan.position) for plan in engine.plans}


def check_together(
    model: Path,
    settings: dict[str, Any],
    prompts: Sequence[list[int]],
    decoded: int,
    pools: Iterable[tuple[int, int | None]],
) -> None:
    """Assert that a crowd of requests gets what each gets alone.

    Parameters
    ----------
    model : Path
    settings : dict of str to Any
        Of compression.
    prompts : sequence of list of int
    decoded : int
        Tokens after each prompt.
    pools : iterable of (int, int or None)
        Tokens of a batch, and blocks of a pool in which some compacted request has to be
        preempted; None for a pool with room for all.

    Raises
    ------
    AssertionError
        For other tokens, log-probabilities or positions of compactions, blocks that did not
        return, and pools that tested nothing.
    """
    with engines.engine(model, settings, max_model_len=1024) as engine:
        alone = [engine.generate([prompt], decoded)[0] for prompt in prompts]
        wanted = positions(engine)
        assert len(wanted) > 10, "hardly anything was compressed"
        assert not engine.preemptions
    for tokens, blocks in pools:
        with engines.engine(
            model,
            settings,
            max_model_len=1024,
            max_num_batched_tokens=tokens,
            max_num_seqs=len(prompts),
            num_gpu_blocks_override=blocks,
        ) as engine:
            engine.crowd()
            together = engine.generate(prompts, decoded)
            if blocks:
                compacted = {plan.request_id for plan in engine.plans}
                assert compacted & set(engine.preemptions), "no compacted request was preempted"
            assert positions(engine) == wanted
            assert engine.pool.get_num_free_blocks() == engine.pool.num_gpu_blocks - 1
        compared = [engines.assert_same(*pair) for pair in zip(together, alone, strict=True)]
        flipped = sum(steps < decoded for steps in compared)
        assert flipped <= min(FLIPS, len(prompts) // 12), "too many near-ties flipped"
