"""Settings of a request: what is accepted, one sentence for everything else, and what it gets."""

from __future__ import annotations

from typing import Any

import pytest
from engines import prefixed
from hypothesis import example, given, settings
from hypothesis import strategies as st
from refusal import check_one_sentence

from vllm_kvcompress.methods import METHODS
from vllm_kvcompress.request import RequestSettings, asked
from vllm_kvcompress.scheduler.requests import RequestSchedules
from vllm_kvcompress.settings import Settings, SettingsError, parse_settings

PLAIN: dict[str, Any] = {"budget": 1024, "max_budget": 2048}
MERGES: dict[str, Any] = {"method": "merge", "pooling": "best", "budget": 1024}
DECODES: dict[str, Any] = {"phase": "decode", "budget": 256}
CHUNKS: dict[str, Any] = {"phase": "during_prefill", "budget": 512}

PROMPT = 3000

ALL_KEYS = [f"kvcompress_{name}" for name in RequestSettings.model_fields]

REFUSED: list[tuple[dict[str, Any], dict[str, Any], list[str]]] = [
    # The server, the request without its prefix, and what the sentence must name.
    (PLAIN, {"budgte": 512}, ["unknown key 'kvcompress_budgte' (value 512)", *ALL_KEYS]),
    (PLAIN, {"": 1}, ["unknown key 'kvcompress_' (value 1)", *ALL_KEYS]),
    (PLAIN, {"phase": "decode"}, ["unknown key 'kvcompress_phase'", *ALL_KEYS]),
    (PLAIN, {"enabled": 2}, ["kvcompress_enabled=2", "0 or 1"]),
    (PLAIN, {"enabled": 1.0}, ["kvcompress_enabled=1.0", "0 or 1"]),
    (PLAIN, {"enabled": "1"}, ["kvcompress_enabled='1'", "0 or 1"]),
    (PLAIN, {"enabled": None}, ["kvcompress_enabled=None", "0 or 1"]),
    (PLAIN, {"report": "yes"}, ["kvcompress_report='yes'", "0 or 1"]),
    (PLAIN, {"method": 3}, ["kvcompress_method=3", "a method's name"]),
    (PLAIN, {"method": "h2o"}, ["kvcompress_method='h2o'", *METHODS, "kvcompress_enabled=0"]),
    (PLAIN, {"method": "none"}, ["kvcompress_method='none'", *METHODS, "kvcompress_enabled=0"]),
    (PLAIN, {"method": "merge"}, ["kvcompress_method='merge'", *METHODS]),
    (MERGES, {"method": "knorm+merge"}, ["kvcompress_method='knorm+merge'", *METHODS, ", merge;"]),
    (PLAIN, {"budget": 0}, ["kvcompress_budget=0", "a whole number of tokens from 1"]),
    (PLAIN, {"budget": -(10**30)}, ["kvcompress_budget=-1000", "a whole number"]),
    (PLAIN, {"budget": 10**30}, ["kvcompress_budget=1000", "a whole number"]),
    (PLAIN, {"budget": 10**5000}, ["kvcompress_budget=(a value of type int)", "whole number"]),
    (PLAIN, {"budget": 512.0}, ["kvcompress_budget=512.0", "a whole number"]),
    (PLAIN, {"budget": "512"}, ["kvcompress_budget='512'", "a whole number"]),
    (PLAIN, {"budget": True}, ["kvcompress_budget=True", "a whole number"]),
    (PLAIN, {"budget": [512]}, ["kvcompress_budget=[512]", "a whole number"]),
    (PLAIN, {"budget": "9" * 500}, ["kvcompress_budget='99", "9…", "a whole number"]),
    (PLAIN, {"budget": 2049}, ["kvcompress_budget=2049", "max_budget allows up to 2048"]),
    (CHUNKS, {"budget": 513}, ["kvcompress_budget=513", "max_budget allows up to 512"]),
    # One block of sinks, 64 recent and 31 beside are 127 tokens: 4 blocks.
    (PLAIN, {"budget": 96}, ["kvcompress_budget=96", "method=kvdiff it must be at least 128"]),
    # 8 blocks more, one for each power of two of the 128 blocks of 4,096 tokens: 383 tokens.
    (MERGES, {"budget": 352}, ["kvcompress_budget=352", "method=merge it must be at least 384"]),
    (PLAIN, {"keep_ratio": 0}, ["kvcompress_keep_ratio=0", "above 0 and up to 1"]),
    (PLAIN, {"keep_ratio": 1.01}, ["kvcompress_keep_ratio=1.01", "above 0 and up to 1"]),
    (PLAIN, {"keep_ratio": float("nan")}, ["kvcompress_keep_ratio=nan", "up to 1"]),
    (PLAIN, {"keep_ratio": float("inf")}, ["kvcompress_keep_ratio=inf", "up to 1"]),
    (PLAIN, {"keep_ratio": True}, ["kvcompress_keep_ratio=True", "a number"]),
    (PLAIN, {"keep_ratio": "0.5"}, ["kvcompress_keep_ratio='0.5'", "a number"]),
    (DECODES, {"keep_ratio": 0.5}, ["kvcompress_keep_ratio=0.5", "generated tokens only"]),
    (
        PLAIN,
        {"budget": 512, "keep_ratio": 0.5},
        ["kvcompress_budget=512", "kvcompress_keep_ratio=0.5", "both set", "one of them"],
    ),
    (PLAIN, {"prune_after": -1}, ["kvcompress_prune_after=-1", "tokens from 0"]),
    (PLAIN, {"prune_after": 1.5}, ["kvcompress_prune_after=1.5", "a whole number"]),
    (PLAIN, {"prune_after": [1, 2]}, ["kvcompress_prune_after=[1, 2]", "a whole number"]),
    (PLAIN, {"context_tokens": 0}, ["kvcompress_context_tokens=0", "length of the prompt"]),
    (PLAIN, {"context_tokens": "all"}, ["kvcompress_context_tokens='all'", "a whole number"]),
    (
        PLAIN,
        {"context_tokens": PROMPT + 1},
        ["kvcompress_context_tokens=3001", "the prompt has 3000 tokens"],
    ),
    (DECODES, {"context_tokens": 9}, ["kvcompress_context_tokens=9", "generated tokens only"]),
    # What is switched off is checked all the same.
    (PLAIN, {"enabled": 0, "budget": "x"}, ["kvcompress_budget='x'", "a whole number"]),
]


def schedules(server: dict[str, Any]) -> RequestSchedules:
    """Of a model with four layers."""
    return RequestSchedules(parse_settings(server), (0, -1), 4, 32, 4096)


@pytest.mark.parametrize(
    ("server", "request_", "named"), REFUSED, ids=[named[0][:40] for *_, named in REFUSED]
)
def test_refuses_in_one_sentence(
    server: dict[str, Any], request_: dict[str, Any], named: list[str]
) -> None:
    with pytest.raises(SettingsError) as error:
        schedules(server).trajectory(PROMPT, prefixed(request_))
    assert len(check_one_sentence(error, named)) < 500


@pytest.mark.parametrize("key", RequestSettings.model_fields)
def test_every_key_is_refused_somewhere(key: str) -> None:
    assert any(key in request for _, request, _ in REFUSED)


@pytest.mark.parametrize(
    ("server", "request_", "changed"),
    [
        (PLAIN, {}, {}),
        (PLAIN, {"enabled": 1, "report": 1}, {}),
        (PLAIN, {"enabled": True, "report": False}, {}),
        (PLAIN, {"budget": 2048}, {"budget": 2048}),
        (PLAIN, {"budget": None}, {}),
        (PLAIN, {"keep_ratio": 0.25}, {"budget": None, "keep_ratio": 0.25}),
        (PLAIN, {"keep_ratio": 1}, {"budget": None, "keep_ratio": 1.0}),
        ({"keep_ratio": 0.5}, {"budget": 96}, {"keep_ratio": None, "budget": 96}),
        ({}, {"keep_ratio": 0.5}, {"keep_ratio": 0.5}),
        (PLAIN, {"prune_after": 0}, {"prune_after": 0}),
        ({"prune_after": 100}, {"prune_after": 0}, {"prune_after": 0}),
        (PLAIN, {"method": "random"}, {"method": "random"}),
        (PLAIN, {"enabled": 0}, {"method": "none"}),
        (PLAIN, {"enabled": 0, "method": "keydiff", "budget": 512}, {"method": "none"}),
        (MERGES, {"method": "merge"}, {}),
        (MERGES, {"method": "knorm"}, {"method": "knorm", "pooling": "mean"}),
        (MERGES, {"enabled": 0}, {"method": "none", "pooling": "mean"}),
        (DECODES, {"budget": 10**6}, {"budget": 10**6}),
        (CHUNKS | {"max_budget": 600}, {"budget": 600}, {"budget": 600}),
    ],
    ids=str,
)
def test_what_a_request_gets(
    server: dict[str, Any], request_: dict[str, Any], changed: dict[str, Any]
) -> None:
    own = parse_settings(server)
    got = asked(own, prefixed(request_)).settings
    if not got.enabled:  # The other settings have no effect.
        got = got.model_copy(update={"budget": own.budget, "keep_ratio": own.keep_ratio})
    assert got.model_dump() == own.model_dump() | changed


def test_keys_of_others_are_theirs() -> None:
    server = Settings()
    for extra_args in (None, {}, {"session_id": "a", "kvcompressed": 1, 3: 4, None: 5}, ["a"], 7):
        assert asked(server, extra_args) == (server, None)


def test_context_of_a_request_that_is_not_compressed() -> None:
    assert asked(Settings(), prefixed({"context_tokens": 7})).context_tokens == 7
    assert asked(Settings(), prefixed({"context_tokens": 7, "enabled": 0})).context_tokens is None


def test_limits_of_a_request() -> None:
    """By band, rounded up to blocks as the server's; groups that keep all keep all."""
    server = {"budget": 1024, "pyramid_beta": 2.0, "bands": 2, "skip_layers": [3]}
    every = RequestSchedules(parse_settings(server), (1, 0, -1), 4, 32, 4096)
    # Layer k has a share of 1 - k/8: 15/16 of 512 tokens in the first two, 3/4 in the third.
    trajectory = every.trajectory(PROMPT, prefixed({"budget": 512, "context_tokens": 2000}))
    first, second, whole = trajectory.schedule.limits
    assert first is not None and second is not None and whole is None
    assert (second.budget, first.budget) == (480, 384)
    assert trajectory.schedule.method == "kvdiff"
    assert trajectory.context_tokens == trajectory.due == 2000
    assert trajectory.schedule.interval == 128
    off = every.trajectory(PROMPT, prefixed({"enabled": 0}))
    assert off.schedule.limits == (None, None, None)
    # Nothing is held but what there is: 94 blocks in each group.
    assert every.most_blocks(off, PROMPT) == 3 * 94
    assert every.most_blocks(off, 10**9) == 3 * 128, "no request is longer than the model"


def test_limits_are_worked_out_once() -> None:
    every = schedules(PLAIN)
    for _ in range(3):
        every.trajectory(PROMPT, prefixed({"budget": 512}))
        every.trajectory(PROMPT + 1, prefixed({"budget": 512, "context_tokens": 9}))
    assert every.schedule.cache_info().misses == 1
    for budget in range(200, 1000):
        every.trajectory(PROMPT, prefixed({"budget": budget}))
    assert every.schedule.cache_info().currsize <= 256


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-2, 4000),
    st.floats(),
    st.text(),
    st.characters(categories=["Cs"]),
    st.binary(),
    st.sampled_from([*METHODS, "none", "merge", "knorm+merge"]),
    st.lists(st.integers()),
    st.dictionaries(st.text(), st.integers()),
    st.builds(object),
)
KEYS = st.one_of(
    st.sampled_from(ALL_KEYS),
    st.sampled_from(ALL_KEYS),
    st.text().map("kvcompress_".__add__),
    st.characters(categories=["Cs"]).map("kvcompress_".__add__),
    st.text(),
    st.integers(),
    st.none(),
)


@settings(max_examples=2000, deadline=None)
@given(
    server=st.sampled_from([PLAIN, MERGES, DECODES, CHUNKS, {"keep_ratio": 0.3}]),
    extra_args=st.one_of(VALUES, st.dictionaries(KEYS, VALUES, max_size=4)),
    prompt=st.integers(1, 4095),
)
@example(PLAIN, {"kvcompress_\ud800": 1}, 1)
@example(PLAIN, {"kvcompress_method": "\ud800"}, 1)
@example(PLAIN, {"kvcompress_budget": 10**6000}, 1)
def test_random_extra_args(server: dict[str, Any], extra_args: Any, prompt: int) -> None:
    """They give a trajectory with bounds, or one sentence."""
    every = schedules(server)
    try:
        trajectory = every.trajectory(prompt, extra_args)
    except SettingsError as error:
        sentence = str(error).encode()
    else:
        assert 0 < every.most_blocks(trajectory, prompt + 100) <= 2 * 132
        assert trajectory.due > 0
        return
    assert sentence.endswith(b".")
