"""The runner against a fake server: what it asks, what it writes, and how it goes on."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from quality_tools import MODEL, SETTINGS, FakeServer, WordTokenizer, write_texts

from bench.quality import __main__ as command
from bench.quality.endpoint import Endpoint, EndpointError
from bench.quality.jobs import RowFile, make_jobs
from bench.quality.options import plan_of, run_parser
from bench.quality.plan import FULL_PLAN, SHORT, Plan, Variant
from bench.quality.rows import AFTER_PROMPT, DURING, FULL, STRICT, Row, RowsError, read_rows
from bench.quality.runner import Runner
from bench.quality.servers import own_servers
from bench.quality.tasks import TASKS
from bench.quality.tasks.case import TaskError
from bench.quality.tasks.texts import VARIABLE
from vllm_kvcompress.bundled import model_directory
from vllm_kvcompress.methods import MERGING, METHODS
from vllm_kvcompress.shares import ALIKE, Shares

TOKENS = 300
PLAN = Plan(
    tasks={"passkey": (STRICT, AFTER_PROMPT)},
    lengths={"": (TOKENS,)},
    count=3,
    methods=("knorm", "streaming"),
    shares=(0.5, 0.9),
)


class Harness:
    """Runs a plan with a tokenizer that can tell what was asked."""

    def __init__(self, path: Path, plan: Plan = PLAN) -> None:
        self.path, self.plan, self.tokenizer = path, plan, WordTokenizer()
        self.progress: list[tuple[int, int]] = []

    def reply(self, prompt: list[int], xargs: dict[str, Any]) -> str:
        """The passkey, unless streaming removes it or 90 % are removed."""
        text = self.tokenizer.decode(prompt)
        if (
            xargs.get("kvcompress_method") == "streaming"
            or xargs.get("kvcompress_keep_ratio") == 0.1
        ):
            return " 00000."
        return f" {text.split('The pass key is ')[1][:5]}."

    def run(self, server: FakeServer, concurrency: int = 4) -> list[Row]:
        async def main() -> None:
            async with Endpoint("http://fake/v1", transport=server.transport) as endpoint:
                info = await endpoint.info()
                done = RowFile(self.path)
                try:
                    tasks = [TASKS[name] for name in self.plan.tasks]
                    methods = [name for name in self.plan.methods if name in info.methods]
                    jobs = make_jobs(self.plan, tasks, self.tokenizer, info, methods, done)
                    runner = Runner(self.plan, endpoint, info, done, concurrency)
                    await runner.run(jobs, lambda *seen: self.progress.append(seen[:2]))
                finally:
                    done.close()

        asyncio.run(main())
        return list(read_rows([self.path]))


@pytest.fixture
def harness(tmp_path: Path) -> Harness:
    return Harness(tmp_path / "rows.jsonl")


def test_rows_of_a_run(harness: Harness) -> None:
    server = FakeServer(harness.reply)
    rows = harness.run(server)
    # Per case: one full-cache request for two rows, and 2 methods x 2 shares x 2 protocols.
    assert len(server.asked) == 3 * 9 and len(rows) == 3 * 10
    assert len({row.row_key for row in rows}) == 30
    assert harness.progress == [(1, 3), (2, 3), (3, 3)]
    for row in rows:
        right = row.method == FULL or (row.method == "knorm" and row.removed == 0.5)
        assert row.score == right and row.prediction
        assert (row.model, row.implementation) == ("model-1", "vllm-kvcompress")
        assert row.tokens == TOKENS and row.depth is not None
        # Of four layers one lost 64 slots and three lost 32, of the context or the prompt.
        if row.method == FULL:
            assert row.kept is None and row.removed == 0
        else:
            assert row.kept is not None
            lost = (1 - row.kept) * (TOKENS if row.protocol == STRICT else TOKENS + 14)
            assert lost == pytest.approx(40, abs=4)


def test_what_is_asked(harness: Harness) -> None:
    server = FakeServer(harness.reply)
    harness.run(server)
    (case, *_) = TASKS["passkey"].cases(3, TOKENS, harness.tokenizer, 0)
    context = harness.tokenizer.encode(case.context)
    question = harness.tokenizer.encode(case.question, add_special_tokens=False)
    asked = [body for body in server.asked if body["prompt"] == context + question]
    assert asked[0]["vllm_xargs"] == {"kvcompress_enabled": 0}
    common = {"model": MODEL, "max_tokens": 10, "temperature": 0, "seed": 0}
    assert all(body.items() >= common.items() for body in asked)
    xargs = [body["vllm_xargs"] for body in asked[1:]]
    strict = {"kvcompress_context_tokens": len(context), "kvcompress_report": 1}
    for method in ("knorm", "streaming"):
        for keep in (0.5, 0.1):
            own = {"kvcompress_method": method, "kvcompress_keep_ratio": keep}
            assert {**own, **strict} in xargs and {**own, "kvcompress_report": 1} in xargs
    assert len(xargs) == 8


def test_stopped_run_goes_on(harness: Harness) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        harness.run(FakeServer(harness.reply, fail_after=7), concurrency=1)
    assert "answered 500: out of order" in str(leaf(caught.value))
    before = list(read_rows([harness.path]))
    assert len(before) == 6 + 4  # the full cache of all three cases, two rows each, first
    with harness.path.open("a") as file:
        file.write('{"task": "passkey", "key": "cut o')
    assert list(read_rows([harness.path])) == before
    server = FakeServer(harness.reply)
    rows = harness.run(server)
    assert rows[:10] == before and len(server.asked) == 27 - 7
    assert len({row.row_key for row in rows}) == len(rows) == 30
    harness.run(again := FakeServer(harness.reply))
    assert again.asked == []


def leaf(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def test_same_rows_whatever_the_concurrency(tmp_path: Path) -> None:
    found = []
    for concurrency in (1, 8):
        harness = Harness(tmp_path / f"{concurrency}.jsonl")
        rows = harness.run(FakeServer(harness.reply), concurrency)
        found.append(sorted(row.line() for row in rows))
    assert found[0] == found[1]


def test_other_prompts_in_the_file(harness: Harness) -> None:
    harness.run(FakeServer(harness.reply))
    lines = [json.loads(line) for line in harness.path.read_text().splitlines()]
    lines[0]["prompt"] = "0" * 16
    harness.path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(RowsError, match="another prompt"):
        harness.run(FakeServer(harness.reply))


def test_too_long_for_the_server(tmp_path: Path) -> None:
    plan = Plan(tasks={"passkey": (STRICT,)}, lengths={"": (4090,)}, count=1)
    with pytest.raises(TaskError, match="at most 4096"):
        Harness(tmp_path / "rows", plan).run(FakeServer(lambda *_: ""))


def test_failing_tasks_are_not_compressed(harness: Harness) -> None:
    """Unless asked for; nothing is left to ask of them afterwards."""
    right = iter([True, False, False])
    server = FakeServer(lambda *asked: harness.reply(*asked) if next(right, False) else "no")
    rows = harness.run(server, concurrency=1)  # a third is right: enough
    assert len(rows) == 30 and {row.method for row in rows} == {FULL, "knorm", "streaming"}
    failing = Harness(harness.path.with_name("failing"))
    rows = failing.run(FakeServer(lambda *_: "no"))
    assert {row.method for row in rows} == {FULL} and len(rows) == 6
    failing.run(again := FakeServer(lambda *_: "no"))
    assert again.asked == []
    failing.plan = replace(PLAN, ask_failing=True)
    assert len(failing.run(FakeServer(lambda *_: "no"))) == 30


def test_server_without_compression(harness: Harness) -> None:
    server = FakeServer(harness.reply, methods=())
    rows = harness.run(server)
    assert {row.method for row in rows} == {FULL} and len(rows) == 6
    assert not any("vllm_xargs" in body for body in server.asked)


@pytest.fixture
def own_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, ":".join(map(str, write_texts(tmp_path))))


def test_language_modelling(own_texts: None, tmp_path: Path) -> None:
    """Only tokens that saw the compressed context are scored: all of the rest but the first."""
    plan = Plan(
        tasks={"lm": (STRICT,)}, lengths={"": (500,)}, count=2, methods=("knorm",), shares=(0.5,)
    )
    harness = Harness(tmp_path / "rows", plan)
    server = FakeServer(lambda *_: "")
    rows = harness.run(server)
    assert len(rows) == len(server.asked) == 4
    cases = {case.key: case for case in TASKS["lm"].cases(2, 500, harness.tokenizer, 0)}
    for row in rows:
        case = cases[row.key]
        context = len(harness.tokenizer.encode(case.context))
        question = len(harness.tokenizer.encode(case.question, add_special_tokens=False))
        assert row.scored_tokens == question - 1
        # The fake server says -1 and rank 1 of odd places, -1.5 and rank 2 of even ones.
        places = range(context + 1, context + question)
        odd = sum(place % 2 for place in places) / len(places)
        assert row.score == pytest.approx(odd)
        assert row.nll == pytest.approx(odd * 1 + (1 - odd) * 1.5)
    assert all(body["max_tokens"] == 1 and body["prompt_logprobs"] == 0 for body in server.asked)


def test_language_modelling_during_prefill(own_texts: None, tmp_path: Path) -> None:
    plan = Plan(
        tasks={"lm": (DURING,)},
        lengths={"": (500,)},
        count=1,
        methods=("knorm",),
        shares=(0.5,),
        prune_after=100,
    )
    harness = Harness(tmp_path / "rows", plan)
    server = FakeServer(lambda *_: "")
    rows = harness.run(server)
    assert [row.scored_tokens for row in rows] == [
        len(body["prompt"]) - 1 - 100 for body in server.asked
    ]
    assert {json.dumps(body["vllm_xargs"], sort_keys=True) for body in server.asked} == {
        '{"kvcompress_enabled": 0}',
        '{"kvcompress_keep_ratio": 0.5, "kvcompress_method": "knorm", '
        '"kvcompress_prune_after": 100, "kvcompress_report": 1}',
    }


def test_no_logprobs(tmp_path: Path) -> None:
    server = FakeServer(lambda *_: "")

    async def main() -> None:
        async with Endpoint("http://fake", transport=server.transport) as endpoint:
            found = await endpoint.token_scores([1, 2, 3])
            assert found.logprobs == [-1, -1.5] and found.ranks == [1, 2]
            assert found.removed_tokens is None
            with pytest.raises(EndpointError, match="does not serve other; it serves fake/model-1"):
                await endpoint.info("other")

    asyncio.run(main())


def test_rows_come_back(tmp_path: Path) -> None:
    row = Row("t", "k", "m", "kvpress", "snapkv", 0.5, STRICT, 0.25, "a\u2028b\x85\n", "f", 10)
    full = Row(
        *("t", "k", "m", "kvpress", FULL, 0.0, STRICT, 0.0, "", "f", 10),
        depth=0.0,
        nll=math.e,
        scored_tokens=3,
        kept=0.5,
        variant="v",
    )
    file = tmp_path / "rows"
    file.write_text(row.line() + "\n\n" + full.line() + "\n")
    assert list(read_rows([file])) == [row, full]
    raw = json.dumps({**json.loads(row.line()), "extra": 1}, ensure_ascii=False)
    file.write_text(raw + "\n")
    assert list(read_rows([file])) == [row]
    file.write_text(row.line().replace("strict", "lenient") + "\n")
    with pytest.raises(RowsError, match="line 1: protocol=lenient is not known"):
        list(read_rows([file]))
    file.write_text("{}\n" + row.line() + "\n")
    with pytest.raises(RowsError, match="line 1 is no result row"):
        list(read_rows([file]))


def test_plans_are_of_known_tasks() -> None:
    for plan in (SHORT, FULL_PLAN):
        assert set(plan.tasks) == set(TASKS)
        assert plan.variants("vt", ["knorm"]) == [
            Variant(FULL, 0.0, STRICT),
            *(Variant("knorm", share, STRICT) for share in (0.25, 0.5, 0.75, 0.9)),
        ]


def servers_of(*words: str) -> list[tuple[str, str, tuple[str, ...], Shares]]:
    """Variant, method, what is asked for and the shares of whole layers of servers to start."""
    arguments = run_parser("").parse_args([*words])
    plan = plan_of(arguments, {"passkey": TASKS["passkey"]})
    model = arguments.model or str(model_directory())
    return [
        (one.variant, one.method, one.methods, one.shares)
        for one in own_servers(plan, model, arguments)
    ]


def test_servers_to_start() -> None:
    methods = ("--methods", "knorm,random,merge,knorm+merge")
    assert servers_of("--model", "some/model-1", *methods) == [
        ("", "knorm", ("knorm", "random"), ALIKE),
        ("", "merge", ("merge",), ALIKE),
        ("", "knorm+merge", ("knorm+merge",), ALIKE),
    ]
    assert servers_of("--model", "some/model-1", "--methods", "merge") == [
        ("", "merge", ("merge",), ALIKE)
    ]


def test_the_bundled_model_is_served_as_by_default_and_flat() -> None:
    assert servers_of("--short") == [
        ("", "kvdiff", ("kvdiff", "keydiff", "knorm"), Shares(1 / 6)),
        ("flat", "kvdiff", ("kvdiff", "knorm"), ALIKE),
    ]
    options = "--kvcompress-skip-layers 0,1,2,3,4,5"
    (own,) = servers_of("--short", "--variant", "few", "--server-options", options)
    assert own == ("few", "kvdiff", ("kvdiff", "keydiff", "knorm"), Shares(0.2))
    options = "--kvcompress-skip-heads 7:2,8:0,23:0 --kvcompress-skip-layers 0,1"
    (own,) = servers_of("--short", "--server-options", options)
    assert own[-1] == Shares(0.1)
    options = "--kvcompress-bands 6"
    (own,) = servers_of("--short", "--server-options", options)
    assert own[-1] == ALIKE


def test_servers_settings_may_come_as_additional_config() -> None:
    config = '{"kvcompress": {"skip_layers": []}}'
    (own,) = servers_of("--short", "--server-options", f"--additional-config '{config}'")
    assert own[-1] == ALIKE


BANDS = ({"band": 0, "layers": list(range(27))}, {"band": -1, "layers": [27, 28, 29]})


def test_layers_kept_whole_leave_less_to_the_others(tmp_path: Path) -> None:
    """Three of thirty: for a quarter in the mean the others keep a sixth; a tenth cannot be."""
    harness = Harness(tmp_path / "rows", replace(PLAN, shares=(0.75, 0.9), methods=("knorm",)))
    server = FakeServer(harness.reply, bands=BANDS)
    rows = harness.run(server)
    asked = {body["vllm_xargs"].get("kvcompress_keep_ratio") for body in server.asked}
    assert asked == {None, 0.166667}
    assert {row.whole for row in rows if row.method == FULL} == {None}
    assert {row.whole for row in rows if row.method == "knorm"} == {0.1}
    assert {row.removed for row in rows} == {0.0, 0.75}
    with pytest.raises(RowsError, match=r"keeps 0\.1 of its layers whole, this one keeps 0 of"):
        harness.run(FakeServer(harness.reply))


def test_boosted_heads_of_a_server_are_reckoned_with(tmp_path: Path) -> None:
    """Three layers whole and six with a boost of 4: 0.15 are left to 21 + 6 * 4 layers of 30."""
    harness = Harness(tmp_path / "rows", replace(PLAN, shares=(0.75,), methods=("knorm",)))
    settings = {**SETTINGS, "boost_heads": [[0, 1], [1, 1], [2, 1]], "boost": 4.0}
    bands = (
        {"band": 0, "layers": list(range(21))},
        {"band": 1, "layers": list(range(21, 27))},
        {"band": -1, "layers": [27, 28, 29]},
    )
    server = FakeServer(harness.reply, settings=settings, bands=bands)
    rows = harness.run(server)
    asked = {body["vllm_xargs"].get("kvcompress_keep_ratio") for body in server.asked}
    assert asked == {None, 0.1}
    assert {row.boosted for row in rows if row.method == "knorm"} == {0.2}
    assert {row.boosted for row in rows if row.method == FULL} == {None}
    assert {row.boost for row in rows if row.method == "knorm"} == {4.0}
    unlike = ({"band": 0, "layers": list(range(27))}, bands[2])
    with pytest.raises(RowsError, match=r"whole and 4 times as much in 0\.2 of them, this one"):
        harness.run(FakeServer(harness.reply, bands=unlike))
    other = {**settings, "boost": 3.0}
    with pytest.raises(RowsError, match=r"keeps 0\.1 .* and 3 times as much in 0\.2 of them; name"):
        harness.run(FakeServer(harness.reply, settings=other, bands=bands))


@given(st.floats(0.01, 0.99), st.floats(0, 0.5))
def test_mean_share_is_kept_where_layers_are_whole(removed: float, whole: float) -> None:
    variant, shares = Variant("knorm", removed, STRICT), Shares(whole)
    assert whole + (1 - whole) * shares.keep_ratio(removed) == pytest.approx(1 - removed)
    found = replace(SHORT, shares=(removed,)).variants("vt", ["knorm"], shares)
    assert (variant in found) == (shares.keep_ratio(removed) >= 0.02)
    assert found[0] == Variant(FULL, 0.0, STRICT)
    if whole == 0:
        assert variant.xargs(9, 0)["kvcompress_keep_ratio"] == round(1 - removed, 6)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "nothing"], "nothing is no task; there are lm, passkey"),
        (["--methods", "h2o"], "h2o is no method; allowed are knorm"),
        (["--protocols", "easy"], "easy is no protocol; allowed are strict"),
        (["--protocols", "during_prefill"], "is for --tasks lm only"),
        (["--shares", "50"], "numbers between 0 and 1"),
        (["--count", "0"], "at least 1"),
        (["--longbench", "/nowhere"], "no JSONL file"),
        (["--tasks", "passkey", "--url", "http://127.0.0.1:9"], "does not answer"),
        (["report", "nowhere.jsonl"], "nowhere.jsonl is not a file"),
    ],
)
def test_arguments_that_cannot_be_used(
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("bench.quality.endpoint.RETRIES", 1)
    assert command.main(arguments) == 2
    assert said in capsys.readouterr().err


def test_own_servers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One for all methods that drop tokens and one for each that merges, until nothing is left."""
    harness = Harness(tmp_path / "rows")
    started: list[list[str]] = []

    @contextmanager
    def serving(model: str | None, options: list[str], log: Path) -> Iterator[str]:
        started.append(options)
        log.touch()
        yield "http://fake"

    def endpoint(url: str, api_key: str | None) -> Endpoint:
        method = started[-1][started[-1].index("--kvcompress-method") + 1]
        names = (*METHODS, *({method} & MERGING.keys()))
        return Endpoint(url, api_key, FakeServer(harness.reply, names).transport)

    monkeypatch.setattr(command, "serving", serving)
    monkeypatch.setattr(command, "Endpoint", endpoint)
    monkeypatch.setattr(command, "_tokenizer", lambda name: harness.tokenizer)
    output = tmp_path / "own.jsonl"
    arguments = ["--model", "some/model-1", "--tasks", "passkey", "--lengths", "300"]
    arguments += ["--count", "1", "--shares", "0.5", "--output", str(output), "--no-report"]
    arguments += ["--server-options", "--kvcompress-sink-tokens 0", "--variant", "no sinks"]
    assert command.main(arguments) == 0
    rows = list(read_rows([output]))
    methods = (*METHODS, *MERGING)
    assert Counter(row.method for row in rows) == Counter(dict.fromkeys((FULL, *methods), 2))
    assert {row.variant for row in rows} == {"no sinks"}
    assert [options[options.index("--kvcompress-method") + 1] for options in started] == [
        *("knorm", "merge", "knorm+merge")
    ]
    for options in started:
        assert options[-2:] == ["--kvcompress-sink-tokens", "0"]
    assert command.main(arguments) == 0
    assert len(started) == 3 and list(read_rows([output])) == rows
    assert "[1/1] passkey-300-0-0" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["own.jsonl"]
