"""The suite runs, resumes, pairs and reports; its figures are for quiet machines."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace as Bag
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="plots need the bench extra")

from test_bench import ROOT, numbers, run

from bench import __main__ as command
from bench.harness.child import CaseFailed
from bench.harness.contenders import contender, with_budgets
from bench.harness.pairing import in_turn
from bench.harness.registry import available, scenario
from bench.harness.store import Store, StoreError
from bench.harness.suite import Case, Options
from bench.scenarios.capacity import largest
from bench.scenarios.latency import Latency
from bench.scenarios.overhead import Overhead
from bench.scenarios.throughput import Throughput, paired

OWN = ("throughput", "serving", "capacity", "latency", "overhead", "profile", "compaction")
SECONDS = {"stock": 100.0, "knorm/8": 25.0, "knorm/2": 80.0, "fp8": 60.0, "knorm+fp8/4": 30.0}


# -- contenders ---------------------------------------------------------------------------


def test_factors_bound_what_is_held_and_budgets_what_is_kept() -> None:
    for name, budget, interval in (
        *(("knorm/8", 224, 32), ("knorm/2", 928, 64), ("merge/4", 480, 32)),
        # Three of thirty layers hold 2,000 tokens, the others 333: 500 on average.
        ("kvdiff-skip/4", 288, 32),
        # Fifteen KV heads of ninety, and 200: 500 on average.
        ("kvdiff-heads/4", 160, 32),
        # Twelve of thirty, and 333: 1,000 on average.
        ("keydiff-skip/2", 288, 32),
        # Layers of a pyramid have L0 to L0 / 4, 5/8 of it on average: 220 of 352.
        *(("knorm@512", 512, 32), ("knorm@1024", 1024, 64), ("pyramid/8", 352, 32)),
    ):
        settings = contender(name, 2000).settings
        assert settings is not None
        assert (settings["budget"], settings["interval"]) == (budget, interval), name
    both = contender("knorm+merge+fp8/4", 2000)
    assert (both.settings["method"], both.cache, both.baseline) == ("knorm+merge", "fp8", "fp8")
    assert contender("stock-capped", 2000).capped
    assert contender("fp8", 2000).settings is None


def test_layers_kept_whole_leave_no_room_for_an_eighth() -> None:
    with pytest.raises(ValueError, match="kept whole alone"):
        contender("kvdiff-skip/8", 2000)


@pytest.mark.parametrize("name", ["knorm", "fp8/4", "knorm/", "magic/8", "knorm/8+fp8"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is no contender; allowed are stock"):
        contender(name, 2000)


def test_budgets_replace_those_of_the_names() -> None:
    assert with_budgets(("stock", "knorm/8", "knorm/2", "merge+fp8/4"), (256, 512)) == (
        *("stock", "knorm@256", "knorm@512"),
        *("merge+fp8@256", "merge+fp8@512"),
    )


# -- cases --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("effort", ["quick", "short", "full"])
def test_cases_have_keys_of_their_own_and_are_json(name: str, effort: Any) -> None:
    cases = scenario(name).cases(Options(effort=effort))
    assert cases or (name, effort) == ("serving", "short")
    assert len({case.key for case in cases}) == len(cases)
    for case in cases:
        text = json.dumps(case.parameters)
        assert json.dumps(json.loads(text)) == text


@pytest.mark.parametrize("name", ["throughput", "serving"])
def test_every_other_repeat_goes_backwards(name: str) -> None:
    options = Options(
        "quick", repeats=2, methods=("stock", "fp8", "knorm/8"), shapes=((1000, 1000),)
    )
    methods = [case.parameters["method"] for case in scenario(name).cases(options)]
    assert methods == ["stock", "fp8", "knorm/8", "knorm/8", "fp8", "stock"]


def test_the_short_suite_has_every_target() -> None:
    short = Options("short")
    methods = {case.parameters["method"] for case in Throughput().cases(short)}
    assert methods >= {"stock", "knorm/8", "knorm/2", "fp8", "knorm+fp8/4"}
    contexts = {
        (case.parameters["prompt_tokens"], case.parameters["method"])
        for case in Latency().cases(short)
    }
    assert (8000, "knorm@1024") in contexts
    assert "idle" in {case.key for case in Overhead().cases(short)}


# -- reports ------------------------------------------------------------------------------


def throughput_results(repeats: int = 1) -> dict[str, dict[str, Any]]:
    """What the cases of the short suite might have given."""
    return {
        case.key: {
            **case.parameters,
            "settings": contender(case.parameters["method"], 2000).settings,
            "kv_bytes": 94 << 20,
            "output_tokens_per_second": 12_000
            / (SECONDS[case.parameters["method"]] + case.parameters["repeat"]),
            "preemptions": 3,
            "peak_concurrency": 7,
            "kv_bytes_per_request": 5 << 20,
            "compaction_share": 0.01,
            "scheduling_share": 0.02,
        }
        for case in Throughput().cases(Options("short", repeats=repeats))
    }


def test_throughput_reports_ratios_of_pairs(tmp_path: Path) -> None:
    text = "\n".join(Throughput().report(throughput_results()))
    heavy, short = "1000+1000, pool of 2, 8 requests", "400+400, pool of 2, 16 requests"
    assert f"| 8x against stock ({heavy}) | at least 3 | 4 | yes |" in text
    assert f"| 2x against stock ({heavy}) | at least 1.6 | 1.25 | no |" in text
    assert f"| fp8 and 4x against fp8 ({short}) | at least 1.6 | 2 | yes |" in text
    assert "| `knorm/8` | 480.0 | 4 | 3 | 7 | 5.0 | 1.0% | 2.0% |" in text

    twice = throughput_results(repeats=2)
    # 100 / 25 and 101 / 26: each repeat has its own stock run.
    assert paired(list(twice.values()), "knorm/8", "stock", "output_tokens_per_second") == [
        pytest.approx(100 / 25),
        pytest.approx(101 / 26),
    ]
    assert "3.94 (3.88 to 4)" in "\n".join(Throughput().report(twice))
    plots = Throughput().plots(twice, tmp_path)
    assert [plot.name for plot in plots] == ["throughput-1000+1000.png", "throughput-400+400.png"]
    assert all(plot.read_bytes().startswith(b"\x89PNG") for plot in plots)
    more = {
        f"{key}, more": row | {"kv_bytes": 188 << 20, "group": "m"} for key, row in twice.items()
    }
    plot, _ = Throughput().plots(twice | more, tmp_path)
    assert plot.name == "throughput-against-KV-memory-1000+1000.png"


def test_reports_bear_missing_cases(tmp_path: Path) -> None:
    rows = throughput_results()
    left = {key: row for key, row in rows.items() if row["method"] == "knorm/8"}
    text = "\n".join(Throughput().report(left))
    assert "Wanted" not in text and "| `knorm/8` | 480.0 |  | 3 |" in text
    for name in OWN:
        assert scenario(name).report({})
        assert scenario(name).plots({}, tmp_path) == []


def test_idle_is_the_mean_of_both_orders() -> None:
    """An engine that is made second is slower by itself: 1.04 and 1 / 1.04 make 1."""
    about = {"batch": 2, "prompt_tokens": 64, "output_tokens": 8, "rounds": 1}
    on = "on, no request long enough"

    def case(base: str, own: str, ratio: float) -> dict[str, Any]:
        steps = {base: 0.05, own: 0.05}
        return {**about, "base": base, "step_seconds": steps, "step_ratios": {own: [ratio]}}

    results = {
        "idle": case("not installed", "installed", 1.02),
        "on, made second": case("installed", on, 1.04),
        "on, made first": case("installed", on, 1 / 1.04),
    }
    text = "\n".join(Overhead().report(results))
    assert "| idle: installed | 0.99 to 1.01 | 1.02 | no |" in text
    assert f"| idle: {on} | 0.99 to 1.01 | 1 | yes |" in text
    assert "| `installed` | 50.00 | 1 |" in text and f"| `{on}` | 50.00 | 1.04 |" in text
    del results["on, made first"]  # one order alone says nothing
    assert f"idle: {on}" not in "\n".join(Overhead().report(results))


def test_profile_reports_shares_of_steps_and_of_operators() -> None:
    row = {
        "method": "knorm/8",
        "batch": 4,
        "step_seconds": 0.04,
        "shares": {"scheduler": 0.01, "compaction": 0.02, "model": 0.8, "logits": 0.1},
        "operators": {"attention": 0.25, "linear layers": 0.75},
    }
    text = "\n".join(scenario("profile").report({"one": row}))
    assert "| `knorm/8` | 4 | 40.0 | 10.0 | 1.0% | 2.0% | 7.0% | 10.0% | 80% | 25% | 75% |" in text


def test_batches_of_other_sizes_are_plots_of_their_own(tmp_path: Path) -> None:
    rows = throughput_results()
    more = {
        f"{key}, more": row | {"requests": 28, "group": "m"}
        for key, row in rows.items()
        if row["prompt_tokens"] == 1000
    }
    names = {plot.name for plot in Throughput().plots(rows | more, tmp_path)}
    assert {"throughput-1000+1000.png", "throughput-1000+1000-28-requests.png"} <= names


@pytest.mark.parametrize("name", ["throughput", "serving"])
def test_requests_may_be_chosen(name: str) -> None:
    cases = scenario(name).cases(Options("quick", requests=7))
    assert {case.parameters["requests"] for case in cases} == {7}
    assert all("7 requests" in case.key for case in cases)


def test_latency_reports_its_target(tmp_path: Path) -> None:
    results = {
        case.key: {
            **case.parameters,
            "baseline": "stock",
            "stock_tpot": [0.1, 0.2],
            "own_tpot": [0.05, 0.12],
            "tpot_ratios": [0.5, 0.6],
            "compactions": 9,
        }
        for case in Latency().cases(Options("short"))
    }
    text = "\n".join(Latency().report(results))
    assert "against stock | at most 0.6 | 0.55 (0.5 to 0.6) | yes |" in text
    assert "| 8000 | `knorm@1024` | 150.0 | 85.0 | 0.55 (0.5 to 0.6) | 9 |" in text
    (plot,) = Latency().plots(results, tmp_path)
    assert plot.name == "TPOT-against-context.png"


# -- engines in turn ----------------------------------------------------------------------


class StubEngine:
    """Gives every request a token per step, prompts one after the other."""

    def __init__(self, name: str, calls: list[str]) -> None:
        self.llm_engine, self.name, self.calls = self, name, calls
        self.left: dict[str, list[int]] = {}

    def add_request(self, name: str, prompt: Any, params: Any) -> None:
        self.left[name] = [0, params.max_tokens]

    def has_unfinished_requests(self) -> bool:
        return bool(self.left)

    def step(self) -> list[Any]:
        self.calls.append(self.name)
        found = []
        for name, row in list(self.left.items()):
            row[0] += 1
            found.append(Bag(request_id=name, outputs=[Bag(token_ids=[0] * row[0])]))
            if row[0] == row[1]:
                del self.left[name]
            if row[0] == 1:
                break
        return found


def test_steps_are_taken_in_turn_and_only_decoding_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.harness.pairing.greedy", lambda tokens: Bag(max_tokens=tokens))
    calls: list[str] = []
    engines = {name: StubEngine(name, calls) for name in "ab"}
    courses = in_turn(engines, ["one", "two"], 5)
    # Two steps with a prompt, then both decode until the first has its five tokens.
    assert [len(course.decoding) for course in courses.values()] == [3, 3]
    assert "".join(calls).startswith("abbaab") and calls.count("a") == calls.count("b") == 6
    for course in courses.values():
        assert course.seconds >= sum(course.decoding) + course.before_decoding > 0
        assert min(course.decoding) <= course.step <= max(course.decoding)


def test_largest_is_found() -> None:
    for answer in (0, 1, 2, 3, 7, 8, 99, 100):
        tried: list[int] = []
        assert largest(lambda n: tried.append(n) or n <= answer, 100) == answer  # noqa: B023
        assert max(tried) <= 100 and len(tried) == len(set(tried))


# -- the runner ---------------------------------------------------------------------------


class Toy:
    """A scenario of three cases, one of which may fail."""

    name, title = "toy", "Toy"

    def cases(self, options: Options) -> list[Case]:
        return [Case(key, {"key": key}) for key in ("one", "two", "three")]

    def report(self, results: Any) -> list[str]:
        return [f"{len(results)} results"]

    def plots(self, results: Any, directory: Path) -> list[Path]:
        return []


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the cases that ran; the runner knows only the toy, which fails on two."""
    ran: list[str] = []

    def run_apart(name: str, case: Case, log: Any) -> dict[str, Any]:
        ran.append(case.key)
        if case.key == "two" and ran.count("two") == 1:
            raise CaseFailed("exit code 1")
        return {"n": len(ran)}

    monkeypatch.setattr(command, "run_apart", run_apart)
    monkeypatch.setattr(command, "available", lambda: ["toy"])
    monkeypatch.setattr(command, "scenario", lambda name: Toy())
    monkeypatch.setattr("bench.harness.report.available", lambda: ["toy"])
    monkeypatch.setattr("bench.harness.report.scenario", lambda name: Toy())
    return ran


def test_a_run_is_resumed_where_it_ended(
    toy: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--quick", "--out", str(tmp_path / "run")]
    assert command.main(words) == 1
    assert toy == ["one", "two", "three"]
    report = (tmp_path / "run" / "report.md").read_text()
    assert "- toy, two: exit code 1" in report and "2 results" in report

    assert command.main(words) == 0
    assert toy == ["one", "two", "three", "two"]
    assert "2 of 3 cases are there already" in capsys.readouterr().out
    report = (tmp_path / "run" / "report.md").read_text()
    assert "Failed" not in report and "3 results" in report
    assert "python -m bench --quick\n" in report and str(tmp_path) not in report

    assert command.main(words) == 0 and len(toy) == 4


def test_cases_are_chosen(toy: list[str], tmp_path: Path) -> None:
    out = ["--out", str(tmp_path)]
    assert command.main(["--keys", "three", *out]) == 0 and toy == ["three"]
    assert command.main(["--minutes", "1e-9", *out]) == 0 and toy == ["three"]
    assert command.main(["--report", *out]) == 0 and toy == ["three"]
    assert command.main(["nothing", *out]) == 2


def test_results_of_another_machine_are_left_alone(tmp_path: Path) -> None:
    store = Store(tmp_path, "a command")
    store.add("toy", "one", {"n": 1}, 2.0)
    data = json.loads(store.path.read_text())
    assert {"cpu", "cores", "torch", "vllm", "vllm_kvcompress", "date"} <= data["machine"].keys()
    data["machine"]["cores"] += 1
    store.path.write_text(json.dumps(data))
    with pytest.raises(StoreError, match=r"cores differ.*--anywhere"):
        Store(tmp_path, "a command")
    assert Store(tmp_path, "a command", anywhere=True).results("toy") == {"one": {"n": 1}}


# -- with vLLM ----------------------------------------------------------------------------


def test_capacity_of_a_pool_of_two(tmp_path: Path) -> None:
    """The real scheduler, simulated worker: 24 blocks, of which a whole request takes 12."""
    out = str(tmp_path / "run")
    run("bench", "capacity", "--quick", "--out", out, "--methods", "stock,knorm/2")
    results = json.loads((tmp_path / "run" / "results.json").read_text())["results"]["capacity"]
    (case,) = results.values()
    stock, knorm = case["figures"]["rows"]
    # Prompts of 10 blocks: two requests fit whole, and one of 23 blocks with one of output.
    assert (stock["requests"], stock["prompt"]) == (2, 23 * 32)
    assert knorm["requests"] >= 3
    assert (tmp_path / "run" / "report.md").read_text().count("\n| `") == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", OWN)
def test_quick_suite(name: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run("bench", name, "--quick", "--out", str(out))
    data = json.loads((out / "results.json").read_text())
    cases = scenario(name).cases(Options("quick"))
    assert list(data["results"][name]) == [case.key for case in cases]
    assert not data["failures"].get(name)
    rows = [row["figures"] for row in data["results"][name].values()]
    assert all(math.isfinite(number) for number in numbers(rows))
    if name == "throughput":
        stock, knorm, fp8 = rows
        assert stock["kv_bytes"] == knorm["kv_bytes"] == fp8["kv_bytes"]
        assert fp8["pool_blocks"] >= 2 * stock["pool_blocks"]
        assert knorm["kv_bytes_per_request"] < stock["kv_bytes_per_request"]
        assert knorm["compaction_share"] > 0 == stock["compaction_share"]
    if name == "latency":
        assert rows[0]["compactions"] > 0
    report = (out / "report.md").read_text()
    assert f"## {scenario(name).title}" in report
    assert str(ROOT) not in report and "Failed" not in report
