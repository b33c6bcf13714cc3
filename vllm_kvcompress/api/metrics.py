"""Prometheus metrics, made anew from the engines' own counts at every scrape.

The engines count; nothing is counted here. So every API server of several gives the same
answer, for all engines, and vLLM's files for several processes are not needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Any

from prometheus_client import generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from vllm.v1.metrics.prometheus import get_prometheus_registry

PREFIX = "kvcompress:"
LABELS = ("model_name", "engine")


class Exposition:
    """What ``generate_latest`` needs of a registry: vLLM's metrics, then ours."""

    def __init__(self, ours: Iterable[Metric], names: set[str]) -> None:
        self.ours, self.names = ours, names

    def collect(self) -> Iterator[Metric]:
        """Every metric, or those of the names asked for."""
        for family in (*get_prometheus_registry().collect(), *self.ours):
            series = {family.name, *(sample.name for sample in family.samples)}
            if not self.names or self.names & series:
                yield family


def exposition(ours: Iterable[Metric], names: set[str]) -> bytes:
    """All metrics of the server in Prometheus' text format.

    Parameters
    ----------
    ours : iterable of Metric
    names : set of str
        Metrics that were asked for; all if empty.
    """
    return generate_latest(Exposition(ours, names))


def collect(engines: Iterable[dict[str, Any]], model: str) -> list[Metric]:
    """Our metrics.

    Parameters
    ----------
    engines : iterable of dict
        Latest snapshot of each engine.
    model : str
        Value of the label ``model_name``.
    """
    blocks = _gauge("pool_blocks", "Blocks of the pool.", "state")
    held = _gauge("bytes_held", "Bytes of KV cache that requests hold.")
    saved = _gauge("bytes_saved", "Bytes that they would hold more without compression.")
    ratio = _gauge("ratio", "Bytes that they would hold without compression by those held.")
    requests = _gauge("requests", "Requests; preempted ones wait again.", "state")
    ended = _counter("requests", "Finished requests.", "method")
    compactions = _counter("compactions", "Compactions of a request in one group.", "method")
    removed = _counter("tokens_removed", "Token slots given up by eviction, over all groups.")
    merged = _counter("tokens_merged", "Token slots given up by pooling, over all groups.")
    freed = _counter("blocks_freed", "Blocks given up by compactions.")
    seconds = _histogram("compaction_seconds", "Time on the host for a step's compactions.")
    sizes = _histogram("request_kv_bytes", "KV cache of a request.", "at")
    for engine in engines:
        own = [model, str(engine["engine"])]
        for state in ("used", "cached", "free"):
            blocks.add_metric([*own, state], engine["pool"][state])
        for state, count in engine["requests"].items():
            requests.add_metric([*own, state], count)
        now = sum(report["bytes_held"] for report in engine["live"])
        stock = sum(report["bytes_uncompressed"] for report in engine["live"])
        held.add_metric(own, now)
        saved.add_metric(own, stock - now)
        if now:
            ratio.add_metric(own, stock / now)
        totals, histograms = engine["totals"], engine["histograms"]
        for family in (ended, compactions):
            name = family.name.removeprefix(PREFIX)
            for method, count in totals[name].items():
                family.add_metric([*own, method], count)
        removed.add_metric(own, totals["tokens_removed"])
        merged.add_metric(own, totals["tokens_merged"])
        freed.add_metric(own, totals["blocks_freed"])
        _observe(seconds, own, histograms["compaction_seconds"])
        _observe(sizes, [*own, "peak"], histograms["peak"])
        _observe(sizes, [*own, "finish"], histograms["finish"])
    return [
        *(blocks, held, saved, ratio, requests, ended, compactions),
        *(removed, merged, freed, seconds, sizes),
    ]


def _gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(PREFIX + name, text, labels=[*LABELS, *labels])


def _counter(name: str, text: str, *labels: str) -> CounterMetricFamily:
    return CounterMetricFamily(PREFIX + name, text, labels=[*LABELS, *labels])


def _histogram(name: str, text: str, *labels: str) -> HistogramMetricFamily:
    return HistogramMetricFamily(PREFIX + name, text, labels=[*LABELS, *labels])


def _observe(
    family: HistogramMetricFamily, labels: Sequence[str], histogram: dict[str, Any]
) -> None:
    bounds = [*map(str, histogram["bounds"]), "+Inf"]
    buckets = list(zip(bounds, accumulate(histogram["counts"]), strict=True))
    family.add_metric(labels, buckets, histogram["sum"])
