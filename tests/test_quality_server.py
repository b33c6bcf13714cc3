"""The evaluation and lm-eval against a real server, and perplexity against transformers."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from quality_tools import write_texts
from server import ROOT, Server

from bench.quality import __main__ as command
from bench.quality.rows import AFTER_PROMPT, FULL, STRICT, Row, read_rows
from bench.quality.tasks import TASKS, prompt_ids, texts

pytestmark = pytest.mark.slow

API_KEY = "sk-of-the-tests"
TOKENS = 600
BLOCK = 32
SINKS = 4
OPTIONS = ["--dtype", "float32", "--enforce-eager", "--kvcompress-sink-tokens", str(SINKS)]
OPTIONS += ["--kvcompress-skip-layers="]  # all layers alike
LM_EVAL = "KVCOMPRESS_LM_EVAL"
"""Names the command ``lm_eval`` of another virtual environment."""


@pytest.fixture(scope="module")
def server(smollm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = Server(OPTIONS, tmp_path_factory.mktemp("server") / "log", API_KEY)
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.kill()


@pytest.fixture(scope="module")
def rows(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Row]]:
    """One run of the command: two tasks, two methods, half removed."""
    directory = tmp_path_factory.mktemp("quality")
    output = directory / "rows.jsonl"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(texts.VARIABLE, ":".join(map(str, write_texts(directory))))
        arguments = ["--url", server.url, "--api-key", API_KEY, "--output", str(output)]
        arguments += ["--tasks", "lm,passkey", "--methods", "knorm,streaming,merge"]
        arguments += ["--lengths", str(TOKENS), "--shares", "0.5", "--count", "2"]
        assert command.main(arguments) == 0
        assert output.with_suffix(".md").is_file()
        size = output.stat().st_size
        assert command.main(arguments) == 0
        assert output.stat().st_size == size  # the second run had nothing to ask
        yield list(read_rows([output]))


def test_rows_of_a_real_server(rows: list[Row]) -> None:
    # The server's method drops tokens, so it cannot be asked for merge.
    assert {row.method for row in rows} == {FULL, "knorm", "streaming"}
    passkeys = [row for row in rows if row.task == "passkey"]
    assert len(passkeys) == 2 * (2 + 2 * 2) and len(rows) == len(passkeys) + 2 * 3
    for row in passkeys:
        if row.method == FULL:
            assert row.score == 1, row
        else:
            # Whole blocks only: up to one more than half stays, of what was asked for.
            whole = TOKENS if row.protocol == STRICT else TOKENS + 14
            assert row.kept is not None
            assert 0.5 <= row.kept <= 0.5 + (BLOCK + 1) / whole + 0.02, row
    assert {row.protocol for row in passkeys} == {STRICT, AFTER_PROMPT}


def test_perplexity_is_that_of_transformers(rows: list[Row], smollm: Path) -> None:
    """With streaming it is known what is gone: the question's rows may not look there."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm)
    model = AutoModelForCausalLM.from_pretrained(
        smollm, dtype=torch.float32, attn_implementation="sdpa"
    )
    language = {(row.key, row.method): row for row in rows if row.task == "lm"}
    cases = TASKS["lm"].cases(2, TOKENS, tokenizer, 0)
    for case in cases:
        prompt = prompt_ids(case, tokenizer)
        context, ids = len(prompt.context), [*prompt.context, *prompt.question]
        losses = {}
        for method in (FULL, "streaming"):
            row = language[case.key, method]
            allowed = torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
            if method == "streaming":
                assert row.kept is not None
                gone = round((1 - row.kept) * context)
                assert gone > 0 and gone % BLOCK == 0
                allowed[context:, SINKS : SINKS + gone] = False
            with torch.inference_mode():
                logits = model(torch.tensor([ids]), attention_mask=allowed[None, None]).logits[0]
            scored = torch.tensor(ids[context + 1 :])
            logprobs = logits[context:-1].float().log_softmax(-1)
            chosen = logprobs.gather(1, scored[:, None])
            losses[method] = -chosen.mean().item()
            assert row.scored_tokens == len(scored)
            assert row.nll == pytest.approx(losses[method], abs=2e-3), (case.key, method)
            right = (logprobs.argmax(-1) == scored).float().mean().item()
            assert row.score == pytest.approx(right, abs=1.5 / len(scored))
        assert math.isfinite(losses[FULL]) and losses["streaming"] != losses[FULL]


def test_lm_eval(server: Server, tmp_path: Path) -> None:
    """The documented command, with and without compression."""
    program = os.environ.get(LM_EVAL) or shutil.which("lm_eval")
    if not program:
        pytest.skip(f"lm-eval is not installed: {LM_EVAL} may name one in another environment")
    scores = {}
    for name, xargs in {
        "full": {"kvcompress_enabled": 0},
        "streaming": {"kvcompress_method": "streaming", "kvcompress_budget": 128},
    }.items():
        arguments = {
            "model": "SmolLM2-135M-Instruct",
            "base_url": f"{server.url}/v1/completions",
            "tokenizer_backend": "None",
            "num_concurrent": "4",
        }
        run = subprocess.run(
            [
                *(program, "--model", "local-completions", "--tasks", "kvcompress_passkey"),
                *("--model_args", ",".join("=".join(pair) for pair in arguments.items())),
                *("--include_path", "bench/quality/lm_eval"),
                *("--output_path", str(tmp_path / name)),
                *("--gen_kwargs", json.dumps({"vllm_xargs": xargs})),
            ],
            cwd=ROOT,
            env={
                **{key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
                "OPENAI_API_KEY": API_KEY,
                "HF_HUB_OFFLINE": "1",
                "HF_DATASETS_OFFLINE": "1",
                "HF_HOME": str(tmp_path / "home"),
            },
            capture_output=True,
            text=True,
            timeout=800,
        )
        assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
        (file,) = (tmp_path / name).rglob("results_*.json")
        found = json.loads(file.read_text())["results"]["kvcompress_passkey"]
        scores[name] = found["exact_match,number"]
    # The first digit comes from the exact prompt; the others do not survive for early keys.
    assert scores["full"] == 1 and scores["streaming"] <= 0.5, scores
