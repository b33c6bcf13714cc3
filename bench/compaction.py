"""A compaction of one band against copying the same bytes, as JSON.

    python -m bench.compaction            # about 3 minutes on one core, 8 GB of memory
    python -m bench.compaction --quick    # one shape and short prompts, to see that it works
    python -m bench.compaction --markdown FILE    # tables of an earlier run's JSON

How it is measured:

* The pages are those of vLLM's CPU attention backend, for five layers, written in the layout
  that its own cache update uses on this machine. They hold normal random numbers. No model
  and no engine runs; what is timed is ``Compactor.run`` with one plan, host work included.
* Plans are the scheduler's: a prompt of so many tokens, all of it old, ``keep_ratio`` 0.25.
  Merging has to keep a block per power of two, which at 512 tokens is more than a quarter;
  ``blocks_before`` and ``blocks_after`` say what there was.
* Blocks are dealt from a shuffled pool larger than the processor's caches, and no block is
  dealt twice before all have been: pages come from memory, not from a cache. Destinations are
  blocks of their own, as if the prompt were in the prefix cache.
* ``bytes`` are the bytes of pages that the plan needs read plus those it writes. Keys and
  values of the kept tokens are written and their values read; keys are read of all tokens where
  the method scores them, of the kept tokens where it does not, and so are values; merging reads
  keys and values of all blocks that merge. Nothing else counts: no index, no intermediate copy,
  nothing a second time.
* ``memcpy_seconds`` is the time of one contiguous ``torch.Tensor.copy_`` between two touched
  buffers, larger than the caches too, that moves as many bytes: ``bytes / 2`` read and as many
  written. ``ratio`` is ``seconds / memcpy_seconds``. Both are medians of alternating runs, on
  one thread each: compiled kernels use no more.
* ``bytes_per_second`` is ``bytes / seconds``. ``growth`` compares the two longest prompts:
  time that grows in proportion to length has ``per_length`` 1.
* ``two_blocks`` are merges of two blocks into one in all layers of the band, one or many of
  them in a plan. There ``ratio_to_copying_sources`` compares with copying the two source blocks
  (two read, two written), another reading of "the same bytes".
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from vllm.utils.torch_utils import kv_cache_dtype_str_to_dtype
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl, _get_attn_isa
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from bench.harness.machine import machine
from vllm_kvcompress.bands import plan_bands
from vllm_kvcompress.levels import Round
from vllm_kvcompress.methods import MERGING, METHODS, POOLINGS
from vllm_kvcompress.methods.pooling import Rotation
from vllm_kvcompress.scheduler.plan import CompactionPlan
from vllm_kvcompress.scheduler.region import Change, Region, levels_before
from vllm_kvcompress.scheduler.schedule import Schedule
from vllm_kvcompress.scheduler.trajectory import Trajectory
from vllm_kvcompress.settings import Settings, parse_settings
from vllm_kvcompress.worker.compactor import Compactor
from vllm_kvcompress.worker.pages import LayerPages
from vllm_kvcompress.worker.setup import band_pages, make_compactor

LAYERS = 5
BLOCK_SIZE = 32
SINKS = 4
SHAPES = {"SmolLM2": (3, 64), "8B-like": (8, 128)}
"""KV heads and head size; 8B-like as in Llama 3 8B and its kin."""

TYPES = {
    "float32": (torch.float32, "auto"),
    "bfloat16": (torch.bfloat16, "auto"),
    "fp8": (torch.bfloat16, "fp8"),
}
"""Type of the model and vLLM's name of the cache's."""

CASES: dict[str, dict[str, Any]] = {
    "knorm": {"method": "knorm"},
    "keydiff": {"method": "keydiff"},
    "kvdiff": {"method": "kvdiff"},
    "streaming": {"method": "streaming"},
    "random": {"method": "random"},
    "merge, mean": {"method": "merge", "pooling": "mean"},
    "merge, best": {"method": "merge", "pooling": "best"},
    "merge, max": {"method": "merge", "pooling": "max"},
    "knorm+merge, mean": {"method": "knorm+merge", "pooling": "mean"},
}


class Effort(NamedTuple):
    """How much to measure."""

    lengths: tuple[int, ...]
    most_runs: int
    least_runs: int
    seconds: float
    """No further runs of a case once they took this long."""
    pool_bytes: int
    """Least size of the pool of pages, and of the buffers that are copied."""
    pairs: tuple[int, ...]
    """Merges of two blocks in a plan."""
    shapes: tuple[str, ...] = tuple(SHAPES)


FULL = Effort((512, 2048, 8000, 32000), 11, 5, 0.3, 256 << 20, (1, 64))
QUICK = Effort((256, 512), 3, 2, 0.1, 16 << 20, (1, 4), ("SmolLM2",))


class Pool:
    """Pages of a band, and blocks dealt from them in random order.

    Parameters
    ----------
    shape : tuple of int
        KV heads and head size.
    dtype : torch.dtype
        The model's.
    cache_dtype : str
        vLLM's name of the cache type.
    least_blocks, least_bytes : int
        Size of the pool: whichever is more.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        dtype: torch.dtype,
        cache_dtype: str,
        least_blocks: int,
        least_bytes: int,
    ) -> None:
        heads, dim = shape
        storage = kv_cache_dtype_str_to_dtype(cache_dtype, SimpleNamespace(dtype=dtype))
        self.half = LAYERS * heads * BLOCK_SIZE * dim * storage.itemsize
        """Bytes of the keys, or of the values, of one block in all layers."""
        self.blocks = max(least_blocks, -(-least_bytes // (2 * self.half)))
        generator = torch.Generator().manual_seed(0)
        cache = torch.empty(LAYERS, self.blocks, heads, BLOCK_SIZE, 2 * dim, dtype=storage)
        numbers = cache[0].view(torch.float8_e4m3fn) if storage == torch.uint8 else cache[0]
        for block in numbers:
            # Any layout holds every number once, so that any order of random ones will do.
            block.copy_(torch.randn(block.shape, generator=generator))
        cache[1:] = cache[0]
        layer = _cpu_layer(dtype, cache_dtype, dim)
        self.isa = layer.isa
        self.pages = band_pages(
            {
                index: LayerPages(layer, own, BLOCK_SIZE, heads, dim, cache_dtype)
                for index, own in enumerate(cache)
            }
        )
        self._deck: list[int] = []
        self._shuffle = random.Random(0)

    def deal(self, count: int) -> list[int]:
        """Some blocks, none of them again before the whole pool was dealt."""
        if len(self._deck) < count:
            self._deck = list(range(self.blocks))
            self._shuffle.shuffle(self._deck)
        dealt, self._deck = self._deck[:count], self._deck[count:]
        return dealt

    def compactor(self, settings: Settings) -> Compactor:
        """What a worker would run these settings with."""
        _, heads, dim = self.pages.shape
        rotation = None
        if POOLINGS[settings.pooling].needs_rotation:
            rotation = Rotation(10000.0 ** (-torch.arange(0, dim, 2) / dim))
        groups = {0: self.pages}
        return make_compactor(settings, groups, self.blocks, rotation, 0, heads)


def _cpu_layer(dtype: torch.dtype, cache_dtype: str, dim: int) -> Any:
    """A layer of the CPU attention backend, as far as writing its cache goes."""
    impl = object.__new__(CPUAttentionBackendImpl)
    impl.attn_type = AttentionType.DECODER
    impl.kv_cache_dtype = cache_dtype
    isa = _get_attn_isa(dtype, BLOCK_SIZE, dim, cache_dtype)
    return SimpleNamespace(impl=impl, isa=isa, dtype=dtype, _k_scale_float=1.0, _v_scale_float=1.0)


class Copies:
    """Contiguous copies between two buffers, each of a part that was not copied lately."""

    def __init__(self, size: int) -> None:
        self.source = torch.ones(size, dtype=torch.uint8)
        self.target = torch.zeros(size, dtype=torch.uint8)
        self.next = 0

    def run(self, size: int) -> float:
        """Seconds for copying so many bytes."""
        if self.next + size > len(self.source):
            self.next = 0
        part = slice(self.next, self.next + size)
        source, target = self.source[part], self.target[part]
        self.next += -(-size // 4096) * 4096
        started = time.perf_counter()
        target.copy_(source)
        return time.perf_counter() - started


def measure(
    make_plan: Callable[[], CompactionPlan],
    compactor: Compactor,
    copies: Copies,
    traffic: list[int],
    effort: Effort,
) -> tuple[float, list[float], int]:
    """Median seconds of a compaction, of copies of so much traffic each, and runs made."""
    seconds: list[float] = []
    copied: list[list[float]] = [[] for _ in traffic]
    compactor.run([make_plan()])
    began = time.perf_counter()
    while len(seconds) < effort.most_runs:
        if len(seconds) >= effort.least_runs and time.perf_counter() - began > effort.seconds:
            break
        plan = make_plan()
        started = time.perf_counter()
        compactor.run([plan])
        seconds.append(time.perf_counter() - started)
        for own, size in zip(copied, traffic, strict=True):
            own.append(copies.run(size // 2))
    return statistics.median(seconds), [statistics.median(own) for own in copied], len(seconds)


def plans_of(
    settings: Settings, tokens: int, pool: Pool
) -> tuple[Callable[[], CompactionPlan], tuple[int, int], int]:
    """Plans for a prompt on ever new blocks, blocks before and after, and page bytes."""
    (band,) = plan_bands(settings, LAYERS, BLOCK_SIZE)
    schedule = Schedule.of(settings, [band.limits], BLOCK_SIZE, tokens)
    walk = Trajectory(schedule, tokens)
    walk.advance(tokens)
    step = walk.steps[0]

    def make() -> CompactionPlan:
        blocks = [KVCacheBlock(number) for number in pool.deal(step.old)]
        change = Change.of_step(Region(blocks, levels_before(step)), step)
        return CompactionPlan(
            request_id="",
            group=0,
            position=tokens,
            sources=[block.block_id for block in change.sources],
            destinations=pool.deal(change.written),
            row_start=0,
            row_ids=[],
            holes=0,
            removed=step.old - step.kept,
            method=settings.method,
            sinks=SINKS,
            pooled=change.pooled,
            rounds=change.rounds,
            outputs=change.outputs,
            exact=step.pooled.exact if step.pooled is not None else 0,
            end=tokens,
        )

    plan = make()
    return make, (step.old, step.kept), page_bytes(settings, plan, pool.half)


def page_bytes(settings: Settings, plan: CompactionPlan, half: int) -> int:
    """Bytes of pages that a plan needs read, and writes; see the head of this file."""
    sources, destinations = len(plan.sources), len(plan.destinations)
    if settings.method in MERGING:
        read = 2 * sources
    elif METHODS[settings.method].needs_values:
        # Scoring reads all keys and all values, and the kept ones are among them.
        read = 2 * sources
    elif METHODS[settings.method].needs_keys:
        read = sources + destinations
    else:
        read = 2 * destinations
    return (read + 2 * destinations) * half


def pair_plan(pool: Pool, pairs: int) -> CompactionPlan:
    """Two blocks into one, so many times."""
    older, newer = list(range(0, 2 * pairs, 2)), list(range(1, 2 * pairs, 2))
    return CompactionPlan(
        request_id="",
        group=0,
        position=2 * pairs * BLOCK_SIZE,
        sources=pool.deal(2 * pairs),
        destinations=pool.deal(pairs),
        row_start=0,
        row_ids=[],
        holes=0,
        removed=pairs,
        method="merge",
        sinks=0,
        pooled=2 * pairs,
        rounds=[Round(0, older, newer)],
        outputs=list(range(2 * pairs, 3 * pairs)),
    )


def compactions(pool: Pool, copies: Copies, effort: Effort) -> Iterator[dict[str, Any]]:
    """Every method at every length."""
    for name, raw in CASES.items():
        settings = parse_settings(
            {**raw, "keep_ratio": 0.25, "sink_tokens": SINKS, "recent_tokens": 0}
        )
        compactor = pool.compactor(settings)
        for tokens in effort.lengths:
            make, (before, after), size = plans_of(settings, tokens, pool)
            seconds, (copied,), runs = measure(make, compactor, copies, [size], effort)
            yield {
                "method": name,
                "tokens": tokens,
                "blocks_before": before,
                "blocks_after": after,
                "bytes": size,
                "seconds": seconds,
                "memcpy_seconds": copied,
                "ratio": seconds / copied,
                "bytes_per_second": size / seconds,
                "runs": runs,
            }


def two_blocks(pool: Pool, copies: Copies, effort: Effort) -> Iterator[dict[str, Any]]:
    """Merges of two blocks into one."""
    # Short cases need more runs for a median that means something.
    effort = effort._replace(most_runs=10 * effort.most_runs)
    for pooling in POOLINGS:
        settings = parse_settings({"method": "merge", "pooling": pooling})
        compactor = pool.compactor(settings)
        for pairs in effort.pairs:
            size, of_sources = 6 * pairs * pool.half, 8 * pairs * pool.half
            seconds, (copied, sources), runs = measure(
                lambda pairs=pairs: pair_plan(pool, pairs),  # type: ignore[misc]
                compactor,
                copies,
                [size, of_sources],
                effort,
            )
            yield {
                "pooling": pooling,
                "merges": pairs,
                "bytes": size,
                "seconds": seconds,
                "memcpy_seconds": copied,
                "ratio": seconds / copied,
                "ratio_to_copying_sources": seconds / sources,
                "bytes_per_second": size / seconds,
                "runs": runs,
            }


def growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Time of the longest prompt over that of the one before it, by case."""
    found = []
    for row, longer in itertools.pairwise(rows):
        if longer["method"] != row["method"] or longer["tokens"] != max(r["tokens"] for r in rows):
            continue
        times, lengths = longer["seconds"] / row["seconds"], longer["tokens"] / row["tokens"]
        found.append(
            {
                "method": row["method"],
                "tokens": [row["tokens"], longer["tokens"]],
                "times_longer": lengths,
                "times_slower": times,
                "per_length": times / lengths,
            }
        )
    return found


def bench(effort: Effort) -> dict[str, Any]:
    """Everything."""
    report: dict[str, Any] = {"compaction": [], "two_blocks": [], "growth": [], "isa": {}}
    longest = max(effort.lengths) // BLOCK_SIZE
    most = max(longest, 2 * max(effort.pairs))
    copies: Copies | None = None
    for shape_name in effort.shapes:
        for type_name, (dtype, cache_dtype) in TYPES.items():
            # Frees the last pool before the next one is made.
            pool = Pool(SHAPES[shape_name], dtype, cache_dtype, 2 * most, effort.pool_bytes)
            # A copy reads half of the traffic: never more than all blocks of a plan.
            size = max(effort.pool_bytes, 2 * most * pool.half)
            if copies is None or len(copies.source) < size:
                copies = None
                copies = Copies(size)
            named = {"shape": shape_name, "cache": type_name}
            report["isa"][f"{shape_name}, {type_name}"] = pool.isa
            rows = list(compactions(pool, copies, effort))
            report["compaction"] += [named | row for row in rows]
            report["growth"] += [named | row for row in growth(rows)]
            report["two_blocks"] += [named | row for row in two_blocks(pool, copies, effort)]
            del pool
            print(f"{shape_name}, {type_name} done", file=sys.stderr)
    return report


def markdown(report: dict[str, Any]) -> str:
    """Tables of a report: times memcpy of the same bytes."""
    columns = list(dict.fromkeys((r["shape"], r["cache"]) for r in report["compaction"]))
    heads = "".join(f" {shape}, {kind} |" for shape, kind in columns)

    def row(label: str, cells: list[str]) -> str:
        return f"| {label} | {' | '.join(cells)} |"

    def cell(rows: list[dict[str, Any]], column: tuple[str, str], key: str) -> str:
        (found,) = [r for r in rows if (r["shape"], r["cache"]) == column]
        milli, ratio = found["seconds"] * 1e3, found[key]
        return f"{ratio:.1f} ({milli:.3g} ms)"

    about, longest = report["machine"], max(r["tokens"] for r in report["compaction"])
    lines = [
        f"Times the memcpy of the same bytes (and milliseconds): `{report['command']}`, "
        f"{about['cpu']}, {report['threads']} thread(s), {about['date']}.",
        "",
    ]
    lines += [f"| {longest} tokens |{heads}", "|---|" + "---|" * len(columns)]
    # Of the report, which may be older than some of today's cases.
    for name in dict.fromkeys(r["method"] for r in report["compaction"]):
        rows = [r for r in report["compaction"] if r["method"] == name and r["tokens"] == longest]
        lines.append(row(f"`{name}`", [cell(rows, column, "ratio") for column in columns]))
    lines += ["", f"| two blocks into one |{heads}", "|---|" + "---|" * len(columns)]
    for pooling in POOLINGS:
        for merges in sorted({r["merges"] for r in report["two_blocks"]}):
            rows = [
                r for r in report["two_blocks"] if r["pooling"] == pooling and r["merges"] == merges
            ]
            label = f"`{pooling}`, {merges} in a plan"
            lines.append(row(label, [cell(rows, column, "ratio") for column in columns]))
    return "\n".join(lines)


def main() -> None:
    """Measure, or print tables of what was measured."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one shape, short prompts")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="tables of this JSON")
    options = parser.parse_args()
    if options.markdown is not None:
        print(markdown(json.loads(options.markdown.read_text())))
        return
    torch.set_num_threads(1)
    report = {
        "command": " ".join(["python -m bench.compaction", *sys.argv[1:]]),
        "machine": machine(),
        "threads": torch.get_num_threads(),
        "band": {"layers": LAYERS, "block_size": BLOCK_SIZE, "keep_ratio": 0.25},
        **bench(QUICK if options.quick else FULL),
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
