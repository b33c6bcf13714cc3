"""What is to be asked: methods, shares, protocols, tasks and lengths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.quality.rows import AFTER_PROMPT, DURING, FULL, STRICT
from vllm_kvcompress.methods import MERGING, METHODS
from vllm_kvcompress.shares import ALIKE, Shares

SHARES = (0.25, 0.5, 0.75, 0.9)
"""Shares removed."""

LEAST_BASELINE = 0.2
"""A task whose mean score with the full cache is lower says nothing about compression: it is
reported as such and left out of the means. Fixed before anything was measured."""

LEAST_RATIO = 0.02
"""Least share that layers are asked to keep, where others keep everything."""

ALL_METHODS = (*METHODS, *MERGING)

GENERATING = (
    *("passkey", "needle", "niah_single_1", "niah_single_2", "niah_single_3"),
    *("niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "vt_1", "cwe", "fwe"),
)
LANGUAGE = "lm"


@dataclass(frozen=True)
class Variant:
    """One way to answer a case.

    Attributes
    ----------
    method : str
        ``full`` or a method's name.
    removed : float
        Share removed; 0 with ``full``.
    protocol : str
    """

    method: str
    removed: float
    protocol: str

    def xargs(
        self, context_tokens: int, prune_after: int, shares: Shares = ALIKE
    ) -> dict[str, Any]:
        """``vllm_xargs`` of a request, for a server with our plugin.

        Parameters
        ----------
        context_tokens : int
            Tokens of the prompt's context.
        prune_after : int
            Only for compression during prefill, as the paper of knorm has it.
        shares : Shares
            Of layers that keep more than the others.

        Returns
        -------
        dict
        """
        if self.method == FULL:
            return {"kvcompress_enabled": 0}
        found: dict[str, Any] = {
            "kvcompress_method": self.method,
            "kvcompress_keep_ratio": round(shares.keep_ratio(self.removed), 6),
            "kvcompress_report": 1,
        }
        if self.protocol == STRICT:
            found["kvcompress_context_tokens"] = context_tokens
        if self.protocol == DURING:
            found["kvcompress_prune_after"] = prune_after
        return found


@dataclass(frozen=True)
class Plan:
    """A whole evaluation.

    Attributes
    ----------
    tasks : mapping of str to tuple of str
        Names of tasks, each with its protocols.
    lengths : mapping of str to tuple of int
        Context lengths in tokens by task; ``""`` holds for tasks that are not named.
    count : int
        Cases of each task and length.
    language_count : int or None
        Windows of each length, if not as many: each request of ``lm`` computes its whole text.
    methods : tuple of str
    flat_methods : tuple of str
        Those that are also measured with all layers alike, where layers are skipped by default.
    shares : tuple of float
    seed : int
    prune_after : int
        Of compression during prefill.
    variant : str
        Name of the server's settings in the rows.
    chat : bool
        Whether prompts are in the model's chat template; those of ``lm`` never are.
    ask_failing : bool
        Whether compression is also measured on tasks that fail with the full cache.
    """

    tasks: Mapping[str, tuple[str, ...]]
    lengths: Mapping[str, tuple[int, ...]]
    count: int
    language_count: int | None = None
    methods: tuple[str, ...] = ALL_METHODS
    flat_methods: tuple[str, ...] = ALL_METHODS
    shares: tuple[float, ...] = SHARES
    seed: int = 0
    prune_after: int = 1024
    variant: str = ""
    chat: bool = False
    ask_failing: bool = False

    def variants(self, task: str, methods: Sequence[str], shares: Shares = ALIKE) -> list[Variant]:
        """The full cache and, of these methods, all that is to be asked of a task.

        Parameters
        ----------
        task : str
        methods : sequence of str
        shares : Shares
            Of layers that keep more than the others.

        Returns
        -------
        list of Variant
            One full-cache variant per protocol first: their request is the same. Shares for
            which the other layers would have to keep next to nothing are left out.
        """
        protocols = self.tasks[task]
        wanted = [Variant(FULL, 0.0, protocol) for protocol in protocols]
        wanted += [
            Variant(method, share, protocol)
            for protocol in protocols
            for method in methods
            for share in self.shares
        ]
        return [one for one in wanted if shares.keep_ratio(one.removed) >= LEAST_RATIO]

    def count_of(self, task: str) -> int:
        """Cases of a task, of each length."""
        return (task == LANGUAGE and self.language_count) or self.count

    def lengths_of(self, task: str) -> tuple[int, ...]:
        """Context lengths of a task."""
        return self.lengths.get(task) or self.lengths[""]


SHORT = Plan(
    tasks={
        LANGUAGE: (STRICT,),
        "passkey": (STRICT, AFTER_PROMPT),
        "needle": (STRICT, AFTER_PROMPT),
        **{task: (STRICT,) for task in GENERATING if task not in ("passkey", "needle")},
    },
    lengths={"": (1500,)},
    count=4,
    language_count=3,
    methods=("kvdiff", "keydiff", "knorm"),
    flat_methods=("kvdiff", "knorm"),
)
"""For ``make quality``."""

FULL_PLAN = replace(
    SHORT,
    lengths={
        "": (2000,),
        LANGUAGE: (2000, 4000, 7500),
        "passkey": (1000, 2000, 4000, 7500),
        "needle": (1000, 2000, 4000, 7500),
    },
    count=20,
    language_count=6,
    methods=ALL_METHODS,
    flat_methods=ALL_METHODS,
)
"""By default."""
