"""Memory accounts of requests, against numbers worked out by hand."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest
from engine_stub import BookkeepingWorker, EngineOptions, Texts, build_scheduler, make_request
from vllm.v1.request import RequestStatus

from vllm_kvcompress.histogram import Histogram
from vllm_kvcompress.limits import Limits, Merging
from vllm_kvcompress.scheduler.account import MAX_MOMENTS, Account, Moment
from vllm_kvcompress.scheduler.snapshot import MAX_WAITING, take_snapshot

SIZE = 4
PAGE = SIZE * 16 * 2 * 4
"""Bytes of a block: 4 tokens of one head of 16 floats, keys and values, in one layer."""

FLAT = Limits(budget=8, ratio=None, sinks=0, recent=0, block_size=SIZE)
WIDE = Limits(budget=16, ratio=None, sinks=0, recent=0, block_size=SIZE)


class Engine:
    """A scheduler with a bookkeeping worker and a model that never says stop."""

    def __init__(self, *limits: Limits | None, **options: Any) -> None:
        self.options = EngineOptions(limits=limits, **options)
        self.scheduler = build_scheduler(self.options)
        self.accounts = self.scheduler.kvcompress_accounts
        self.texts = Texts()
        self.worker = BookkeepingWorker(self.options, self.texts)
        self.requests: dict[str, Any] = {}

    def add(self, name: str, prompt: Sequence[int], outputs: int, **extra: Any) -> Any:
        request = make_request(self.options, name, prompt, outputs)
        request.sampling_params.stop_token_ids.clear()
        request.sampling_params._all_stop_token_ids.clear()
        request.sampling_params.extra_args = extra or None
        self.requests[name] = request
        self.scheduler.add_request(request)
        return request

    def add_named(self, request_id: str, outputs: int) -> None:
        """A request of 20 tokens with an id as vLLM makes it."""
        request = make_request(self.options, "0", [1] * 20, outputs)
        request.request_id, request.arrival_time = request_id, time.time()
        request.sampling_params._all_stop_token_ids.clear()
        request.sampling_params.stop_token_ids.clear()
        self.requests[request_id] = request
        self.scheduler.add_request(request)

    def step(self, times: int = 1) -> Any:
        for _ in range(times):
            output = self.scheduler.schedule()
            result = self.scheduler.update_from_output(
                output, self.worker.execute(output, self.requests)
            )
        return result

    def report(self, name: str) -> dict[str, Any]:
        found = take_snapshot(self.scheduler)
        return next(r for r in (*found["live"], *found["closed"]) if r["id"] == name)


def slots(report: dict[str, Any]) -> list[tuple[int, int, int, int]]:
    """Blocks, tokens kept, removed and merged per band."""
    keys = ("blocks", "tokens_kept", "tokens_removed", "tokens_merged")
    return [tuple(band[key] for key in keys) for band in report["bands"]]


def sizes(report: dict[str, Any]) -> list[float]:
    """Blocks held, at the peak, uncompressed, and at the peak of that."""
    names = ("bytes_held", "bytes_peak", "bytes_uncompressed", "bytes_uncompressed_peak")
    return [report[name] / PAGE for name in names]


def test_a_request_by_hand() -> None:
    """20 + 10 tokens; budgets of 2 and 4 blocks; compactions at 20 and 28 tokens."""
    engine = Engine(FLAT, WIDE)
    engine.add("0", [1] * 20, 10)
    assert engine.report("0")["state"] == "waiting"
    assert sizes(engine.report("0")) == [0, 0, 0, 0]
    assert engine.report("0")["ratio"] is engine.report("0")["prefill_seconds"] is None

    engine.step()  # The whole prompt: 5 blocks per group.
    report = engine.report("0")
    assert report["state"] == "running"
    assert sizes(report) == [10, 10, 10, 10]
    assert slots(report) == [(5, 20, 0, 0), (5, 20, 0, 0)]
    assert report["ratio"] == 1
    assert report["compactions"] == 0

    engine.step()  # 5 blocks become 2 and 4, and one more holds token 21.
    report = engine.report("0")
    assert sizes(report) == [3 + 5, 10, 12, 12]
    assert slots(report) == [(3, 9, 12, 0), (5, 17, 4, 0)]
    assert report["ratio"] == 12 / 8
    assert report["compactions"] == 2

    engine.step(7)  # 28 tokens: 7 blocks without compression.
    assert sizes(engine.report("0")) == [4 + 6, 10, 14, 14]
    engine.step()  # 4 become 2, 6 become 4, and one more each.
    report = engine.report("0")
    assert sizes(report) == [3 + 5, 10, 16, 16]
    assert slots(report) == [(3, 9, 20, 0), (5, 17, 12, 0)]
    assert report["state"] == "finished"
    assert report["finish_reason"] == "length"
    assert (report["prompt_tokens"], report["output_tokens"], report["cached_tokens"]) == (
        20,
        10,
        0,
    )
    assert report["compactions"] == 4
    assert report["method"] == "kvdiff"
    assert 0 <= report["prefill_seconds"] < report["decode_seconds"] < 60
    history = [(m["tokens"], m["bytes_held"] // PAGE, m["blocks"]) for m in report["history"]]
    assert history == [
        (20, 10, [5, 5]),
        (20, 10, [5, 5]),
        (20, 6, [2, 4]),
        (28, 10, [4, 6]),
        (28, 6, [2, 4]),
        (29, 8, [3, 5]),
    ]

    found = take_snapshot(engine.scheduler)
    assert found["live"] == []
    assert found["pool"]["used"] == 0
    assert found["totals"] == {
        "requests": {"kvdiff": 1},
        "compactions": {"kvdiff": 4},
        "tokens_removed": 32,
        "tokens_merged": 0,
        "blocks_freed": 8,
        "preemptions": 0,
        "prompt_tokens": 20,
        "output_tokens": 10,
    }
    peak, finish = found["histograms"]["peak"], found["histograms"]["finish"]
    assert (peak["sum"], finish["sum"]) == (10 * PAGE, 8 * PAGE)
    assert sum(peak["counts"]) == sum(finish["counts"]) == 1


@pytest.mark.parametrize("count", [True, False])
def test_merged_tokens_are_not_removed(count: bool) -> None:
    """32 tokens in 8 blocks; a budget of 6 merges some, of which nothing is lost."""
    limits = Limits(24, None, 0, 0, SIZE, Merging(None, count))
    engine = Engine(limits, num_blocks=80)
    engine.add("0", [1] * 32, 4)
    engine.step(2)
    report = engine.report("0")
    assert slots(report) == [(6 + 1, 33 - 8, 0, 8)]
    assert sizes(report) == [7, 8, 9, 9]
    row = engine.scheduler.kv_cache_manager.coordinator.single_type_managers[0].req_to_blocks["0"]
    assert len(row) == 9 and (max(block.ref_cnt for block in row) > 1) == count
    engine.step(2)
    assert take_snapshot(engine.scheduler)["totals"]["tokens_merged"] == 8
    assert engine.report("0")["finish_reason"] == "length"


def test_shared_pages_are_charged_by_share() -> None:
    """The second request finds 3 of 4 blocks in the cache, the third one too."""
    engine = Engine(Limits(64, None, 0, 0, SIZE), num_blocks=80)
    prompt = [*[1] * 12, 2, 2, 2]
    engine.add("0", prompt, 20)
    engine.step(1)
    assert sizes(engine.report("0")) == [4, 4, 4, 4]
    engine.add("1", prompt, 20)
    engine.step()
    assert engine.report("1")["cached_tokens"] == 12
    assert sizes(engine.report("1")) == sizes(engine.report("0")) == [3 / 2 + 1, 4, 3 / 2 + 1, 4]
    engine.add("2", prompt, 20)
    engine.step()
    assert [sizes(engine.report(name))[0] for name in "012"] == [1 + 2, 1 + 1, 1 + 1]
    assert engine.report("0")["ratio"] == 1, "sharing is not compression"
    assert take_snapshot(engine.scheduler)["pool"]["used"] == 3 + 2 + 1 + 1
    engine.scheduler.finish_requests("0", RequestStatus.FINISHED_ABORTED)
    assert sizes(engine.report("1"))[0] == 3 / 2 + 1
    # What it leaves in the cache is nobody's.
    pool = take_snapshot(engine.scheduler)["pool"]
    assert (pool["used"], pool["cached"]) == (3 + 1 + 1, 1)


def test_preempted_request() -> None:
    engine = Engine(FLAT, caching=False)
    engine.add("0", [1] * 20, 10)
    engine.step(3)
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    report, found = engine.report("0"), take_snapshot(engine.scheduler)
    assert report["state"] == "waiting"
    assert report["preemptions"] == 1
    assert sizes(report) == [0, 5, 0, 6]
    assert slots(report) == [(0, 0, 0, 0)]
    assert found["requests"] == {"running": 0, "waiting": 1, "preempted": 1}
    assert found["totals"]["preemptions"] == 1
    output = found["totals"]["output_tokens"]
    assert output == 3
    engine.step(9)
    report = engine.report("0")
    assert report["state"] == "finished"
    assert report["preemptions"] == 1
    # The first compaction was run twice.
    assert report["compactions"] == 3
    assert slots(report) == [(3, 9, 20, 0)]
    assert take_snapshot(engine.scheduler)["totals"]["compactions"] == {"kvdiff": 3}


def test_aborted_requests() -> None:
    engine = Engine(FLAT, max_requests=1)
    engine.add("0", [1] * 20, 10)
    engine.add("1", [1] * 20, 10)
    engine.step(2)
    engine.scheduler.finish_requests(["0", "1"], RequestStatus.FINISHED_ABORTED)
    ran, waited = engine.report("0"), engine.report("1")
    assert ran["finish_reason"] == waited["finish_reason"] == "abort"
    assert sizes(ran) == [3, 5, 6, 6]
    assert sizes(waited) == [0, 0, 0, 0]
    assert waited["cached_tokens"] is waited["prefill_seconds"] is waited["decode_seconds"] is None
    found = take_snapshot(engine.scheduler)
    assert found["totals"]["requests"] == {"kvdiff": 2}
    # It put out nothing, so its prompt was not served.
    assert found["totals"]["prompt_tokens"] == 20
    assert sum(found["histograms"]["peak"]["counts"]) == 1
    assert not engine.accounts.live and not engine.accounts.starting


def test_only_so_many_finished_requests_are_kept() -> None:
    engine = Engine(FLAT, finished_requests=3)
    for name in "01234":
        engine.add(name, [1] * 5, 1)
        engine.step()
    found = take_snapshot(engine.scheduler)
    assert [report["id"] for report in found["closed"]] == ["4", "3", "2"]
    assert found["closings"] == 5
    assert [r["id"] for r in take_snapshot(engine.scheduler, closings=4)["closed"]] == ["4"]
    assert take_snapshot(engine.scheduler, closings=5)["closed"] == []
    assert found["totals"]["requests"] == {"kvdiff": 5}


def test_no_finished_requests_are_kept_if_so_set() -> None:
    engine = Engine(FLAT, finished_requests=0)
    engine.add("0", [1] * 5, 1, kvcompress_report=1)
    outputs = engine.step()
    assert take_snapshot(engine.scheduler)["closed"] == []
    (output,) = outputs[0].outputs
    assert output.kv_transfer_params["kvcompress"]["id"] == "0"


def test_waiting_requests_are_counted_and_some_listed() -> None:
    engine = Engine(FLAT, max_requests=1)
    for number in range(MAX_WAITING + 20):
        engine.add(str(number), [1] * 5, 5)
    engine.step()
    found = take_snapshot(engine.scheduler)
    assert found["requests"] == {"running": 1, "waiting": MAX_WAITING + 19, "preempted": 0}
    assert len(found["live"]) == 1 + MAX_WAITING
    assert {r["id"] for r in found["live"]} == {str(n) for n in range(1 + MAX_WAITING)}


def test_history_of_those_wanted() -> None:
    engine = Engine(FLAT)
    engine.add("0", [1] * 20, 10)
    engine.add("1", [2] * 20, 10)
    engine.step(4)
    histories = take_snapshot(engine.scheduler, wanted=["1", "no such"])["histories"]
    assert histories.keys() == {"1"}
    times = [moment["time"] for moment in histories["1"]]
    assert times == sorted(times)
    assert histories["1"][-1]["bytes_held"] == engine.report("1")["bytes_held"]


def test_history_is_bounded() -> None:
    request = make_request(EngineOptions(limits=(FLAT,)), "0", [1], 1)
    account = Account(request, "knorm", {}, [0], [0])
    for number in range(1000):
        account.note(Moment(float(number), number, [number], number))
        assert len(account.moments) <= MAX_MOMENTS
    assert account.moments[0].tokens == 0
    assert account.moments[-1].tokens == 999
    assert account.peak == 999
    assert [m.tokens for m in account.moments] == sorted(m.tokens for m in account.moments)


@pytest.mark.parametrize("asked", [{}, {"kvcompress_report": 0}, {"kvcompress_report": [1]}])
def test_the_response_carries_no_account_unasked(asked: dict[str, Any]) -> None:
    engine = Engine(FLAT)
    engine.add("0", [1] * 20, 1, **asked)
    (output,) = engine.step()[0].outputs
    assert output.finish_reason is not None
    assert output.kv_transfer_params is None


def test_the_response_carries_the_account_if_asked() -> None:
    engine = Engine(FLAT)
    engine.add("0", [1] * 20, 3, kvcompress_report=1)
    for _ in range(3):
        (output,) = engine.step()[0].outputs
    closed = engine.report("0")
    del closed["history"]
    assert output.kv_transfer_params == {"kvcompress": closed}
    assert sizes(closed) == [3, 5, 6, 6]


def test_nothing_is_done_in_steps_without_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """The accounts cost nothing while requests merely decode."""
    engine = Engine(FLAT)
    engine.add("0", [1] * 20, 20)
    engine.step(2)
    calls = []
    for name in ("scheduled", "tokens_arrived", "compacted", "releasing", "rows"):
        monkeypatch.setattr(engine.accounts, name, lambda *args, name=name: calls.append(name))
    engine.step(6)  # The next compaction is at 28 tokens.
    assert calls == []


def test_histogram() -> None:
    histogram = Histogram([1, 2])
    for value in (0.5, 1, 1.5, 2, 7):
        histogram.observe(value)
    assert histogram.as_dict() == {"bounds": [1, 2], "counts": [2, 2, 1], "sum": 12}
