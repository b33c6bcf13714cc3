"""The Grafana dashboard and the scrape example, against the metrics that the code makes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml
from prometheus_client.core import Metric

from vllm_kvcompress.api import metrics
from vllm_kvcompress.histogram import KV_BYTES, SECONDS, Histogram

DASHBOARDS = Path(__file__).parents[1] / "dashboards"


def exposed() -> dict[str, set[str]]:
    """Every series of the code, with the names of its labels."""
    by_method = {"knorm": 1}
    totals: dict[str, Any] = dict.fromkeys(("tokens_removed", "tokens_merged", "blocks_freed"), 0)
    engine = {
        "engine": 0,
        "pool": {"used": 0, "cached": 0, "free": 0},
        "requests": {"running": 1, "waiting": 0, "preempted": 0},
        "live": [{"bytes_held": 1, "bytes_uncompressed": 2}],
        "totals": {**totals, "requests": by_method, "compactions": by_method},
        "histograms": {
            "compaction_seconds": Histogram(SECONDS).as_dict(),
            "peak": Histogram(KV_BYTES).as_dict(),
            "finish": Histogram(KV_BYTES).as_dict(),
        },
    }
    families: list[Metric] = metrics.collect([engine], "model")
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def dashboard() -> Any:
    return json.loads((DASHBOARDS / "grafana.json").read_text())


def expressions() -> list[str]:
    found = [target["expr"] for panel in dashboard()["panels"] for target in panel["targets"]]
    return found + [v["definition"] for v in dashboard()["templating"]["list"] if "definition" in v]


def test_every_metric_and_label_of_the_dashboard_exists() -> None:
    series = exposed()
    seen = set()
    for expression in expressions():
        used = re.findall(r"([a-zA-Z_]\w*:\w+)(?:\{([^}]*)\})?", expression)
        assert used, expression
        for name, selectors in used:
            assert name in series, f"{name} is not a metric"
            seen.add(name)
            labels = set(re.findall(r"(\w+)=~?\"", selectors))
            labels |= set(re.findall(r"by \((\w+)\)", expression))
            assert labels <= series[name], f"{name} has no label {labels - series[name]}"
    # And the other way round: each metric is shown somewhere.
    assert {name for name in series if not name.endswith(("_sum", "_count"))} <= seen


def test_dashboard_can_be_imported() -> None:
    found = dashboard()
    assert found["title"] and found["uid"] == "kvcompress" and found["schemaVersion"] >= 36
    ids = [panel["id"] for panel in found["panels"]]
    assert len(ids) == len(set(ids)) > 10
    places: set[tuple[int, int]] = set()
    for panel in found["panels"]:
        assert panel["title"] and panel["description"]
        assert panel["datasource"]["uid"] == "${datasource}"
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & places, "panels overlap"
        places |= cells
    assert [v["name"] for v in found["templating"]["list"]] == [
        "datasource",
        "model_name",
        "engine",
    ]


def test_scrape_example() -> None:
    (job,) = yaml.safe_load((DASHBOARDS / "prometheus.yml").read_text())["scrape_configs"]
    assert job["metrics_path"] == "/metrics"
    assert job["static_configs"] == [{"targets": ["127.0.0.1:8000"]}]
