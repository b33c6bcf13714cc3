"""The tasks, by name. Everything here is pure Python and numpy and imports no vLLM."""

from __future__ import annotations

from bench.quality.tasks.case import Case, Prompt, Task, prompt_ids
from bench.quality.tasks.counting import CommonWords, FrequentWords
from bench.quality.tasks.language import LanguageModelling
from bench.quality.tasks.needles import Needles
from bench.quality.tasks.passkey import Needle, Passkey
from bench.quality.tasks.tracking import VariableTracking

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        LanguageModelling(),
        Passkey(),
        Needle(),
        Needles("niah_single_1", "noise"),
        Needles("niah_single_2", "essay"),
        Needles("niah_single_3", "essay", value_kind="uuids"),
        Needles("niah_multikey_1", "essay", keys=4),
        Needles("niah_multikey_2", "needle"),
        Needles("niah_multikey_3", "needle", key_kind="uuids", value_kind="uuids"),
        Needles("niah_multivalue", "essay", values=4),
        Needles("niah_multiquery", "essay", keys=4, queries=4),
        VariableTracking(),
        VariableTracking("vt_1", hops=1),
        CommonWords(),
        FrequentWords(),
    )
}
"""RULER's tasks have its settings and names; ``vt_1`` is its ``vt`` with one hop instead of 4."""

__all__ = ["TASKS", "Case", "Prompt", "Task", "prompt_ids"]
