"""Accounts of a running engine in this process, asked for as offline users do."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engines
import pytest
from test_engine import make_prompts

from vllm_kvcompress.api.offline import snapshot
from vllm_kvcompress.settings import SettingsError

SETTINGS = {"method": "knorm", "budget": 128, "bands": 2, "recent_tokens": 16, "interval": 16}
PAGE = 2 * 32 * 2 * 4 * 32 * 4
"""Two layers, 32 tokens, keys and values of 4 heads of 32 numbers of 4 bytes."""


def test_offline(tiny_llama: Path) -> None:
    """Workers, planner and accounts agree about what was done; an idle engine answers."""
    prompts = make_prompts(6, seed=5, shortest=150, longest=400)
    with engines.engine(tiny_llama, SETTINGS, max_num_seqs=4) as engine:
        steps: list[dict[str, Any]] = []
        schedule = engine.scheduler.schedule

        def watched(*args: Any, **kwargs: Any) -> Any:
            steps.append(snapshot(engine.llm))
            return schedule(*args, **kwargs)

        engine.scheduler.schedule = watched
        engine.generate(prompts, 40)
        engine.scheduler.schedule = schedule
        found = snapshot(engine.llm)
        (worker,) = engine.llm.collective_rpc("kvcompress_totals")
        num_blocks = engine.pool.num_gpu_blocks

    assert max(step["requests"]["running"] for step in steps) == 4
    for step in steps:
        held = sum(report["bytes_held"] for report in step["live"])
        assert held == pytest.approx(step["pool"]["used_bytes"], abs=len(prompts))
    assert found["layout"]["bytes_per_block"] == PAGE
    assert found["pool"]["bytes"] == num_blocks * PAGE
    assert found["live"] == [] and found["pool"]["used"] == 0
    assert len(found["closed"]) == len(prompts)
    lengths = Counter(report["prompt_tokens"] for report in found["closed"])
    assert lengths == Counter(map(len, prompts))
    totals, times = found["totals"], found["histograms"]["compaction_seconds"]
    assert totals["compactions"] == {"knorm": worker["compactions"]}
    assert sum(report["compactions"] for report in found["closed"]) == worker["compactions"] > 12
    assert totals["tokens_removed"] == worker["tokens_removed"]
    assert totals["blocks_freed"] == worker["blocks_freed"]
    assert totals["compaction_seconds"] == times["sum"] == pytest.approx(worker["seconds"])
    assert 0 < sum(times["counts"]) <= worker["compactions"]
    for report in found["closed"]:
        removed = sum(band["tokens_removed"] for band in report["bands"])
        lost = report["bytes_uncompressed"] - report["bytes_held"]
        assert lost == removed // 32 * PAGE > 0
        assert report["bytes_peak"] < report["bytes_uncompressed_peak"]


def test_offline_without_compression() -> None:
    config = SimpleNamespace(additional_config={})
    llm: Any = SimpleNamespace(llm_engine=SimpleNamespace(vllm_config=config))
    with pytest.raises(SettingsError, match="runs without compression"):
        snapshot(llm)


def test_settings_of_requests(tiny_llama: Path) -> None:
    """An account says by what its own request was compressed."""
    wishes = [
        {},
        {"method": "streaming", "budget": 96},
        {"enabled": 0},
        {"keep_ratio": 0.5, "context_tokens": 200},
        {"report": 1},
    ]
    prompts = make_prompts(len(wishes), seed=6, shortest=300, longest=310)
    with engines.engine(tiny_llama, SETTINGS) as engine:
        engine.generate(prompts, 20, wishes)
        found = snapshot(engine.llm)
    closed = sorted(found["closed"], key=lambda report: report["arrival"])
    assert [report["method"] for report in closed] == [
        *("knorm", "streaming", "none", "knorm", "knorm")
    ]
    shown = [report["settings"] for report in closed]
    assert [own["budget"] for own in shown] == [128, 96, 128, None, 128]
    assert [own["keep_ratio"] for own in shown] == [None, None, None, 0.5, None]
    assert [own["context_tokens"] for own in shown] == [None, None, None, 200, None]
    assert [report["compactions"] > 0 for report in closed] == [True, True, False, True, True]
    assert found["totals"]["requests"] == {"knorm": 3, "streaming": 1, "none": 1}
