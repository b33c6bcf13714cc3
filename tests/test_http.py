"""End to end over HTTP: ``python serve.py`` and the ``openai`` client, one server for all tests."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import openai
import pytest
from server import ROOT, Server, environment, wait_until

from vllm_kvcompress.api import models

MODEL = "SmolLM2-135M-Instruct"
API_KEY = "sk-of-the-tests"
BLOCK = 32
BUDGET = 256
INTERVAL = 32
CONTEXT = 8192

OPTIONS = ["--dtype", "bfloat16", "--kvcompress-budget", str(BUDGET)]
OPTIONS += ["--kvcompress-skip-layers="]  # all layers alike
OPTIONS += ["--kvcompress-interval", str(INTERVAL), "--kvcompress-max-budget", "512"]
# vLLM's default of 0 kills the engine core at once, and with it the totals in the log.
OPTIONS += ["--shutdown-timeout", "60"]

FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. ",
    "The river runs down to the sea. Birds sing in the old trees. The wind moves over the hills. ",
)
CITIES = ("Barcelona", "London", "Paris", "Berlin", "Tokyo", "Chicago", "Boston", "Dublin")


@pytest.fixture(scope="module")
def server(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server with compression for the whole module."""
    running = Server(OPTIONS, tmp_path_factory.mktemp("server") / "log", API_KEY)
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.kill()


@pytest.fixture(autouse=True)
def log_of_a_failure(server: Server) -> Iterator[None]:
    """Let pytest show what the server said during a test that failed."""
    since = len(server.said())
    yield
    print(server.tail(since))


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return server.client()


def haystack(secret: str, sentences: int, depth: float) -> str:
    """A text with a password in it, cut off where the model can only go on with the password.

    The password is the third token of the answer. The first comes out of the prompt's own
    forward, with the cache still whole; all others are read from what compression kept.
    """
    parts = [FILLER[index % 2] for index in range(sentences)]
    needle = f"The secret password is {secret}. "
    parts.insert(int(depth * sentences), f"{needle}Remember it. {needle}")
    return "".join(parts) + "\nThe secret"


def complete(client: openai.OpenAI, prompt: str, max_tokens: int, **added: Any) -> Any:
    return client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=max_tokens, temperature=0, **added
    )


def ask(client: openai.OpenAI, question: str, **added: Any) -> Any:
    return client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": question}],
        max_tokens=24,
        temperature=0,
        **added,
    )


def held(server: Server, metrics: dict[str, float]) -> int:
    """Blocks in use."""
    return round(metrics["vllm:kv_cache_usage_perc"] * server.blocks)


def at_rest(server: Server) -> bool:
    metrics = server.metrics()
    return metrics["vllm:num_requests_running"] == 0 == metrics["vllm:kv_cache_usage_perc"]


# Start-up


def test_banner(server: Server) -> None:
    banner = server.said().split("(APIServer")[0]  # vLLM's log begins
    for words in (
        f"Serving {MODEL} at {server.url} ",
        "kvdiff, at the end of the prompt, then every 32 generated tokens",
        "layers 0-29: 256 tokens per request",
        "memory freed by prompt length in tokens: 88% at 2,048, 94% at 4,096, 97% at 8,192",
    ):
        assert words in banner


def test_example_of_the_banner_works(server: Server) -> None:
    url, headers, body = server.example()
    answer = server.http.post(url, headers=headers, content=body)
    assert answer.status_code == 200
    assert "Paris" in answer.json()["choices"][0]["message"]["content"]


def test_log_names_the_groups(server: Server) -> None:
    log = server.said()
    assert "kvcompress: band 0: layers 0 to 29 keep 256 tokens per request" in log
    assert f"1 KV cache groups of {server.blocks + 1} blocks of {BLOCK} tokens" in log


def test_endpoints(server: Server, client: openai.OpenAI) -> None:
    assert server.http.get("/health").status_code == 200
    assert server.http.get("/version").json()["version"].startswith("0.32.")
    (card,) = client.models.list().data
    assert card.id == MODEL
    assert card.model_dump()["max_model_len"] == CONTEXT
    assert server.metrics().keys() >= {"vllm:num_requests_running", "vllm:prompt_tokens_total"}


def test_api_key_is_needed(server: Server, client: openai.OpenAI) -> None:
    body = {"model": MODEL, "prompt": "Hi", "max_tokens": 1}
    assert server.http.post("/v1/completions", json=body).status_code == 401
    assert server.http.get("/v1/models").status_code == 401
    with pytest.raises(openai.AuthenticationError):
        complete(server.client("sk-wrong"), "Hi", 1)
    assert complete(client, "Hi", 1).usage.completion_tokens == 1
    assert API_KEY not in server.said()


# Answers


def test_chat_streams_the_same(client: openai.OpenAI) -> None:
    whole = ask(client, "What is the capital of France?")
    assert "Paris" in whole.choices[0].message.content
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(ask(client, "What is the capital of France?", stream=True))
    assert len(chunks) > 1
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("prompt", "length", "expected"),
    [("The capital of France is", 4, " Paris"), (haystack("Jupiter", 16, 0.5), 8, " Jupiter.")],
    ids=["short", "compressed"],
)
def test_completion_streams_the_same(
    prompt: str, length: int, expected: str, client: openai.OpenAI
) -> None:
    whole = complete(client, prompt, length)
    assert expected in whole.choices[0].text
    assert whole.usage.completion_tokens == length
    chunks = list(complete(client, prompt, length, stream=True))
    assert len(chunks) > 1
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text


def test_logprobs(client: openai.OpenAI) -> None:
    """Of the answer to a compressed prompt, and in a chat."""
    found = complete(client, haystack("Jupiter", 16, 0.2), 8, logprobs=3).choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == 8
    for chosen, top in zip(found.token_logprobs, found.top_logprobs, strict=True):
        assert math.isfinite(chosen)
        assert chosen == pytest.approx(max(top.values()))
        assert 0 < sum(map(math.exp, top.values())) <= 1.001
    answer = ask(client, "What is the capital of France?", logprobs=True, top_logprobs=2)
    tokens = answer.choices[0].logprobs.content
    assert "Paris" in "".join(token.token for token in tokens)
    assert all(math.isfinite(token.logprob) and token.logprob <= 0 for token in tokens)
    assert all(len(token.top_logprobs) == 2 for token in tokens)


@pytest.mark.parametrize("depth", [0.2, 0.8])
def test_password_in_a_compressed_prompt(
    depth: float, server: Server, client: openai.OpenAI
) -> None:
    """It is found while the request holds a fifth of the blocks that stock vLLM would need."""
    prompt = haystack("strawberry", 62, depth)
    decoded = 4 * INTERVAL
    answer, blocks, usage = "", [], None
    assert wait_until(lambda: at_rest(server), 30)
    for number, chunk in enumerate(
        complete(
            client,
            prompt,
            decoded,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    ):
        usage = chunk.usage or usage
        answer += "".join(choice.text for choice in chunk.choices)
        if number % 8 == 7:
            metrics = server.metrics()
            if metrics["vllm:num_requests_running"] == 1:
                blocks.append(held(server, metrics))
    assert answer.startswith(" password is strawberry.")
    assert usage is not None
    assert 1400 < usage.prompt_tokens < 1600
    assert usage.completion_tokens == decoded
    # The budget, what decoding adds until the next compaction, and a block just begun.
    assert len(blocks) >= 3
    assert min(blocks) > 0
    assert max(blocks) <= (BUDGET + INTERVAL) // BLOCK + 1 < usage.prompt_tokens // BLOCK / 4


def test_eight_clients_at_once(server: Server, client: openai.OpenAI) -> None:
    """Each gets the answer it gets alone, all with compressed caches."""
    prompts = [haystack(city, 16 + index, 0.5) for index, city in enumerate(CITIES)]

    with ThreadPoolExecutor(len(prompts)) as clients:
        together = list(clients.map(lambda prompt: complete(client, prompt, 10), prompts))
    for city, prompt, answer in zip(CITIES, prompts, together, strict=True):
        assert answer.usage.prompt_tokens > BUDGET + INTERVAL
        assert answer.choices[0].text.startswith(f" password is {city}.")
        assert answer.choices[0].text == complete(client, prompt, 10).choices[0].text


# Memory accounts


def accounts(server: Server, path: str) -> Any:
    answer = server.http.get(
        f"/v1/kvcompress/{path}", headers={"Authorization": f"Bearer {API_KEY}"}
    )
    assert answer.status_code == 200, answer.text
    return answer.json()


def finished(server: Server, request_id: str) -> Any:
    """The account of a request once the endpoints know that it finished."""
    path = f"requests/{request_id}"
    assert wait_until(lambda: accounts(server, path)["state"] == "finished", 30)
    return accounts(server, path)


def test_account_of_a_request(server: Server, client: openai.OpenAI) -> None:
    """Its numbers follow from its lengths; the pool's and the metrics agree with them."""
    assert wait_until(lambda: at_rest(server), 30)
    time.sleep(1.1)
    (before,) = accounts(server, "summary")["engines"]
    metrics = server.metrics()
    # Of its own text, so that nothing of it is in the prefix cache.
    prompt = "One, two, three. " + haystack("strawberry", 62, 0.5)
    answer = complete(client, prompt, 4 * INTERVAL, extra_body={"ignore_eos": True})
    report = models.AccountWithHistory.model_validate(finished(server, answer.id))
    assert report.id.startswith(f"{answer.id}-0-")
    tokens = answer.usage.prompt_tokens
    assert (report.prompt_tokens, report.output_tokens) == (tokens, 4 * INTERVAL)
    assert (report.state, report.finish_reason, report.method) == ("finished", "length", "kvdiff")
    assert report.settings.budget == BUDGET
    assert report.cached_tokens == report.preemptions == 0
    assert report.compactions == 4

    config = models.Config.model_validate(accounts(server, "config"))
    (band,), block_bytes = report.bands, config.bands[0].bytes_per_block
    # 30 layers, keys and values of 3 heads of 64 numbers of 2 bytes.
    assert block_bytes == 30 * BLOCK * 2 * 3 * 64 * 2
    assert config.pool_blocks == server.blocks + 1
    end = tokens + 4 * INTERVAL - 1  # The last token is never read.
    whole = -(-end // BLOCK)
    assert band.tokens_removed == (whole - band.blocks) * BLOCK
    assert band.tokens_kept == end - band.tokens_removed <= BUDGET + INTERVAL
    assert report.bytes_held == band.blocks * block_bytes
    assert report.bytes_peak == -(-tokens // BLOCK) * block_bytes
    assert report.bytes_uncompressed == report.bytes_uncompressed_peak == whole * block_bytes
    assert report.ratio == pytest.approx(whole / band.blocks)
    at = [moment.tokens for moment in report.history]
    expected = [tokens + step * INTERVAL for step in range(4) for _ in range(2)]
    assert at == [at[0], *expected, end]
    course = [moment.bytes_held for moment in report.history]
    assert all(course[index] > course[index + 1] for index in range(1, 9, 2))

    assert wait_until(lambda: at_rest(server), 30)
    time.sleep(1.1)
    (after,) = models.Summary.model_validate(accounts(server, "summary")).engines
    assert after.requests.running == after.pool.used == after.bytes_held == 0
    assert after.ratio is None
    totals, old = after.totals, before["totals"]
    assert totals.requests["kvdiff"] - old["requests"].get("kvdiff", 0) == 1
    assert totals.compactions["kvdiff"] - old["compactions"].get("kvdiff", 0) == 4
    assert totals.tokens_removed - old["tokens_removed"] == band.tokens_removed
    assert totals.prompt_tokens - old["prompt_tokens"] == tokens
    assert totals.output_tokens - old["output_tokens"] == 4 * INTERVAL
    assert totals.compaction_seconds > old["compaction_seconds"]
    now = server.metrics()
    for name, change in {
        "requests_total": 1,
        "compactions_total": 4,
        "tokens_removed_total": band.tokens_removed,
        "tokens_merged_total": 0,
        "blocks_freed_total": band.tokens_removed // BLOCK,
        "compaction_seconds_count": 4,
        "request_kv_bytes_sum": report.bytes_peak + report.bytes_held,
    }.items():
        name = f"kvcompress:{name}"
        assert now[name] - metrics[name] == pytest.approx(change), name
    assert now["kvcompress:pool_blocks"] == server.blocks


def test_accounts_while_requests_run(server: Server, client: openai.OpenAI) -> None:
    """What running requests hold is what the pool says is in use."""
    prompts = [haystack(city, 16 + index, 0.5) for index, city in enumerate(CITIES)]
    seen = []
    with ThreadPoolExecutor(len(prompts)) as clients:
        answers = clients.map(
            lambda prompt: complete(client, prompt, 150, extra_body={"ignore_eos": True}), prompts
        )
        for _ in range(100):
            summary = accounts(server, "summary")["engines"][0]
            running = accounts(server, "requests?state=running")["requests"]
            again = accounts(server, "summary")["engines"][0]
            if summary == again and summary["requests"]["running"] == len(prompts):
                held = sum(request["bytes_held"] for request in running)
                seen.append((held, summary["pool"]["used_bytes"], summary["bytes_held"], running))
            if len(seen) == 3:
                break
            time.sleep(0.5)
        assert len(list(answers)) == len(prompts)
    assert seen, "the requests were never seen running together"
    for held, used, total, running in seen:
        assert len(running) == len(prompts)
        assert held == total == pytest.approx(used, abs=len(prompts))
        assert all(request["decode_seconds"] is None or request["bands"] for request in running)


def test_accounts_need_the_api_key(server: Server) -> None:
    for path in ("summary", "requests", "requests/x", "config"):
        assert server.http.get(f"/v1/kvcompress/{path}").status_code == 401
        wrong = {"Authorization": "Bearer sk-wrong"}
        assert server.http.get(f"/v1/kvcompress/{path}", headers=wrong).status_code == 401


def test_account_of_an_unknown_request(server: Server) -> None:
    answer = server.http.get(
        "/v1/kvcompress/requests/nobody", headers={"Authorization": f"Bearer {API_KEY}"}
    )
    assert answer.status_code == 404
    assert "'nobody' is known" in answer.json()["error"]["message"]


def test_openapi_lists_the_accounts(server: Server) -> None:
    paths = server.http.get("/openapi.json").json()["paths"]
    for path in ("summary", "requests", "requests/{request_id}", "config"):
        assert "get" in paths[f"/v1/kvcompress/{path}"]


def test_metrics_name_no_request(server: Server, client: openai.OpenAI) -> None:
    answer = complete(client, "Hi", 1)
    finished(server, answer.id)
    lines = [
        line
        for line in server.http.get("/metrics").text.splitlines()
        if line.startswith("kvcompress:")
    ]
    assert len(lines) > 40
    assert answer.id not in "".join(lines)
    assert all('engine="0",' in line and f'model_name="{MODEL}"' in line for line in lines)


def test_responses_carry_the_account_if_asked(server: Server, client: openai.OpenAI) -> None:
    asked = {"vllm_xargs": {"kvcompress_report": 1}}
    prompt = haystack("Jupiter", 16, 0.5)
    assert complete(client, prompt, 8).model_dump()["kv_transfer_params"] is None
    answer = complete(client, prompt, 8, extra_body=asked)
    report = answer.model_dump()["kv_transfer_params"]["kvcompress"]
    assert report["id"].startswith(answer.id)
    assert report["output_tokens"] == 8 and report["compactions"] == 1
    chat = ask(client, "What is the capital of France?", extra_body=asked)
    report = chat.model_dump()["kv_transfer_params"]["kvcompress"]
    assert report["output_tokens"] == chat.usage.completion_tokens
    response = client.responses.create(
        model=MODEL, input="Hi", max_output_tokens=8, extra_body=asked
    )
    report = response.model_dump()["kv_transfer_params"]["kvcompress"]
    assert report["id"].startswith(response.id) and report["state"] == "finished"
    # vLLM's streams have no place for it; they stay as they are.
    chunks = list(complete(client, prompt, 8, stream=True, extra_body=asked))
    assert "".join(c.choices[0].text for c in chunks) == answer.choices[0].text


# What clients do wrong


@pytest.mark.parametrize(
    ("status", "changes"),
    [
        (404, {"model": "nobody"}),
        (400, {"max_tokens": -1}),
        (400, {"temperature": -1}),
        (400, {"prompt": [5] * (CONTEXT + 1)}),
        (400, {"prompt": [5] * CONTEXT, "max_tokens": 16}),
        (400, {"prompt": "Hi", "logprobs": 10**6}),
        (400, {"prompt": [10**6]}),
        (400, {"prompt": {"not": "text"}}),
    ],
    ids=[
        "unknown model",
        "negative length",
        "negative temperature",
        "prompt too long",
        "no room for the answer",
        "too many logprobs",
        "unknown token",
        "wrong type",
    ],
)
def test_bad_request(status: int, changes: dict[str, Any], server: Server) -> None:
    body = {"model": MODEL, "prompt": "Hi", "max_tokens": 1, **changes}
    answer = post(server, json.dumps(body))
    assert answer.status_code == status
    assert answer.json()["error"]["message"]
    assert serves_on(server)


def test_malformed_json(server: Server) -> None:
    assert post(server, '{"model": ').status_code in (400, 422)
    assert serves_on(server)


def post(server: Server, body: str) -> Any:
    return server.http.post(
        "/v1/completions",
        content=body,
        headers={"Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json"},
    )


def serves_on(server: Server) -> bool:
    body = {"model": MODEL, "prompt": "Hi", "max_tokens": 1}
    return server.healthy() and post(server, json.dumps(body)).status_code == 200


# Settings of a request


BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "Hi there", "max_tokens": 1},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 1},
}
every_endpoint = pytest.mark.parametrize("path", BODIES)
streamed_or_not = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


def ask_for(server: Server, path: str, xargs: Any, **added: Any) -> Any:
    """An answer to a short request with ``vllm_xargs``."""
    body = {"model": MODEL, "temperature": 0, **BODIES[path], "vllm_xargs": xargs, **added}
    return server.http.post(
        path,
        content=json.dumps(body),
        headers={"Authorization": f"Bearer {API_KEY}", "Content-Type": "application/json"},
    )


@every_endpoint
@streamed_or_not
@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("kvcompress_budgte", 512, "allowed are kvcompress_enabled, kvcompress_method, kvcompress"),
        (
            "kvcompress_budget",
            "many",
            "kvcompress_budget='many' is not allowed: it must be a whole",
        ),
        ("kvcompress_budget", 256.0, "kvcompress_budget=256.0 is not allowed"),
        ("kvcompress_budget", [256], "kvcompress_budget=[256] is not allowed"),
        ("kvcompress_budget", 513, "the server's max_budget allows up to 512"),
        ("kvcompress_budget", 96, "it must be at least 128"),
        ("kvcompress_keep_ratio", 0, "it must be a number above 0 and up to 1"),
        ("kvcompress_method", "merge", "allowed are knorm, keydiff, kvdiff, streaming, random;"),
        ("kvcompress_enabled", 2, "it must be 0 or 1"),
        ("kvcompress_prune_after", -1, "it must be a whole number of tokens from 0"),
        ("kvcompress_context_tokens", 5000, "the context is a part of it"),
    ],
)
def test_setting_that_cannot_be(
    key: str, value: Any, said: str, stream: bool, path: str, server: Server
) -> None:
    """A 400 with one sentence, whether the answer was to be streamed or not."""
    answer = ask_for(server, path, {key: value}, stream=stream)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert said in error["message"] and key in error["message"]
    assert error["param"] == key


@every_endpoint
@streamed_or_not
def test_settings_that_can_be(stream: bool, path: str, server: Server) -> None:
    for wishes in (
        {"enabled": 0, "report": 1},
        {"method": "keydiff", "budget": 512, "prune_after": 1},
        {"method": "streaming", "keep_ratio": 0.5},
        {"context_tokens": 1},
    ):
        xargs = {f"kvcompress_{key}": value for key, value in wishes.items()}
        answer = ask_for(server, path, {**xargs, "of_others": [1, 2]}, stream=stream)
        assert answer.status_code == 200, answer.text
        assert "error" not in answer.text.split("[DONE]")[0] or not stream


def test_question_after_a_compressed_context(server: Server, client: openai.OpenAI) -> None:
    """The password is found by a question that the compression did not see."""
    prompt = haystack("strawberry", 62, 0.5)
    context, question = prompt.split("\nThe secret")[0], "\nThe secret"
    tokenized = server.http.post(
        "/tokenize",
        json={"model": MODEL, "prompt": context},
        headers={"Authorization": f"Bearer {API_KEY}"},
    ).json()
    tokens = tokenized["count"]
    before = server.metrics()["vllm:prompt_tokens_total"]
    for _ in range(2):
        answer = complete(
            client,
            context + question,
            8,
            extra_body={"vllm_xargs": {"kvcompress_context_tokens": tokens}},
        )
        assert answer.choices[0].text.startswith(" password is strawberry.")
        assert tokens < answer.usage.prompt_tokens
    assert server.metrics()["vllm:prompt_tokens_total"] > before


def bad_xargs(draw: random.Random) -> Any:
    """``vllm_xargs`` of which no part can be used."""
    text = "".join(chr(draw.randrange(1, 0xE000)) for _ in range(draw.randrange(1, 8)))
    number = draw.choice([-1, -(2**40), 2**40, 2**70, -0.5, 1e300, float("nan"), float("inf")])
    name = draw.choice(["budget", "prune_after", "context_tokens", "keep_ratio", "enabled"])
    wrong = draw.choice([text, number, [], [1, 2], ["a"], "", str(draw.randrange(500)), 0.123])
    while name == "keep_ratio" and wrong == 0.123:
        name = draw.choice(["budget", "prune_after", "context_tokens", "enabled"])
    bad = draw.choice(
        [
            {f"kvcompress_{name}": wrong},
            {f"kvcompress_{text}": draw.choice([wrong, 1])},
            {"kvcompress_method": wrong},
            {"kvcompress_budget": 256, "kvcompress_keep_ratio": 0.5},
            {"kvcompress_budget": draw.choice([1, 64, 96, 513, 10**9])},
            {"kvcompress_context_tokens": draw.randrange(CONTEXT, 10**6)},
            {"kvcompress_budget": None},
            {"kvcompress_budget": {"tokens": 256}},
            {"kvcompress_budget": [[256]]},
            [text],
            text,
        ]
    )
    if isinstance(bad, dict) and draw.random() < 0.3:
        bad = {"kvcompress_report": 0, "session": "a", **bad}
    return bad


@pytest.mark.parametrize(
    "count", [40, pytest.param(500, marks=pytest.mark.slow)], ids=["some", "many"]
)
def test_bad_bodies(count: int, server: Server, client: openai.OpenAI) -> None:
    """None gets through, none is an error of the server, and the engine goes on answering."""
    draw = random.Random(count)
    wanted = complete(client, "The capital of France is", 4).choices[0].text
    for number in range(count):
        xargs = bad_xargs(draw)
        path = draw.choice(list(BODIES))
        answer = ask_for(server, path, xargs, stream=draw.random() < 0.5)
        assert answer.status_code == 400, (path, xargs, answer.text)
        assert answer.json()["error"]["message"]
        if number % 10 == 9:
            xargs = {"kvcompress_method": "random", "kvcompress_context_tokens": 3}
            found = complete(
                client,
                "The capital of France is",
                4,
                extra_body={"vllm_xargs": draw.choice([xargs, {}])},
            )
            assert found.choices[0].text == wanted
    assert serves_on(server)
    assert wait_until(lambda: at_rest(server), 30)


def test_client_that_disconnects(server: Server, client: openai.OpenAI) -> None:
    """In the middle of a long, compressed answer: the request ends and its blocks return."""
    before = server.metrics()["vllm:generation_tokens_total"]
    stream = complete(
        client,
        haystack("Jupiter", 16, 0.5),
        4000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    assert len(list(islice(stream, 40))) == 40
    assert not at_rest(server)
    stream.close()
    assert wait_until(lambda: at_rest(server), 30)
    assert server.metrics()["vllm:generation_tokens_total"] - before < 2000
    assert serves_on(server)


# The command line and the end


def test_bad_budget_ends_with_one_sentence() -> None:
    run = subprocess.run(
        [sys.executable, "serve.py", "--kvcompress-budget", "10"],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 2
    assert "Traceback" not in run.stderr
    (sentence,) = [line for line in run.stderr.splitlines() if "kvcompress" in line]
    assert "budget=10 is not allowed" in sentence and sentence.endswith(".")
    assert "Serving" not in run.stdout


def test_shutdown_says_what_was_compressed(server: Server, client: openai.OpenAI) -> None:
    """The last test: it stops the server."""
    complete(client, haystack("Jupiter", 16, 0.5), 8)
    assert server.stop() == 0
    assert not server.healthy()
    said = re.findall(
        r"kvcompress: kvdiff compacted (\d+) requests in (\d+) steps per group, "
        r"removed (\d+) tokens and freed (\d+) blocks",
        server.said(),
    )
    # Logged while they changed, and once more at the end.
    requests, steps, tokens, blocks = map(int, said[-1])
    assert 1 <= requests <= steps <= blocks
    assert tokens == BLOCK * blocks
