"""The generate command, prompts that must fit, and the example."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from vllm_kvcompress.hf.__main__ import main
from vllm_kvcompress.hf.prompts import PromptError, fit_prompt, split_prompt

EXAMPLE = Path(__file__).parent.parent / "examples" / "hf_quickstart.py"


@pytest.fixture(scope="module")
def tokenizer(smollm: Path) -> Any:
    return AutoTokenizer.from_pretrained(smollm)


@pytest.fixture(scope="module")
def model_name(tiny_llama: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model that understands the tokenizer's 49,152 tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("tiny-with-tokenizer")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


def run(model_name: str, results: Path, *options: str) -> dict[str, Any]:
    folder = ["--results", str(results), "--max_new_tokens", "20", "--interval", "8"]
    assert main(["generate", "--model_name", model_name, *folder, *options]) == 0
    (path,) = results.iterdir()
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("strategy", ["greedy", "sample", "beam_search"])
def test_results_are_written_as_json(model_name: str, tmp_path: Path, strategy: str) -> None:
    options = ["--decoding_strategy", strategy, "--initial_local_window", "40", "--batch_size", "2"]
    prompts = ["One two three. " * 12, "Red green. " * 20, "Short."]
    result = run(model_name, tmp_path / "results", *options, "--prompt", *prompts)
    assert [answer["prompt"] for answer in result["answers"]] == [p.strip() for p in prompts]
    assert all(answer["text"] for answer in result["answers"])
    assert [batch["prompts"] for batch in result["batches"]] == [2, 1]
    assert [batch["steps"] for batch in result["batches"]] == [20, 20]
    first, last = result["batches"]
    assert first["kv_cache_bytes"] < first["uncompressed_bytes"]
    assert last["kv_cache_bytes"] == last["uncompressed_bytes"]
    assert result["options"]["decoding_strategy"] == strategy
    assert result["settings"]["budget"] == 40


def test_options_reach_the_settings(model_name: str, tmp_path: Path) -> None:
    options = "--initial_local_window 90 --steepness_coefficient 2 --sink_tokens 3"
    options += " --skip_prefill_compression --seq_pooling_type best --merge_weighting none"
    settings = run(model_name, tmp_path, *options.split(), "--prompt", "Hello.")["settings"]
    expected = {
        "method": "merge",
        "budget": 90,
        "pyramid_beta": 2.0,
        "sink_tokens": 3,
        "recent_tokens": (68 - 9) // 2,  # layer 1 of 2 has ceil(67.5); 256 has nine digits
        "phase": "decode",
        "pooling": "best",
        "merge_weighting": "none",
        "interval": 8,
    }
    assert {name: settings[name] for name in expected} == expected


def test_an_overlong_context_is_cut_and_the_instruction_is_whole(
    model_name: str, tmp_path: Path, tokenizer: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    context = tmp_path / "context.txt"
    context.write_text("First words. " + "So it goes on and on. " * 100 + "Last words.")
    instruction = "Which words come first, and which last? " * 5
    options = ["--context", str(context), "--prompt", instruction, "--initial_local_window", "64"]
    results = tmp_path / "results"
    command = ["generate", "--model_name", model_name, "--results", str(results), *options]
    assert main(command) == 2
    assert "use --compress_context to cut the context" in capsys.readouterr().err
    assert not results.exists()
    result = run(model_name, results, *options, "--compress_context")
    (answer,) = result["answers"]
    assert answer["prompt"].startswith("First words. So it goes on")
    assert answer["prompt"].endswith("Last words.\n\n" + instruction.strip())
    assert 256 - 20 - 3 <= answer["prompt_tokens"] <= 256 - 20
    assert len(tokenizer(answer["prompt"])["input_ids"]) == answer["prompt_tokens"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--initial_local_window 10", "initial_local_window=10 is too small"),
        ("--initial_local_window -1", "initial_local_window=-1"),
        ("--steepness_coefficient 0", "steepness_coefficient=0.0"),
        ("--sink_tokens -1", "sink_tokens=-1"),
        ("--max_length 300", "the model takes 256 tokens"),
        ("--max_length 128", "--max_length 128 is not allowed"),
        ("--batch_size 0", "--batch_size 0 is not allowed"),
        ("--interval 0", "interval=0"),
        ("--device nowhere", "--device nowhere cannot be used"),
        ("--context nowhere.txt", "nowhere.txt"),
        ("--model_name ./nowhere", "nowhere"),
    ],
)
def test_wrong_options_are_refused_in_a_sentence(
    model_name: str,
    tmp_path: Path,
    options: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    window = [] if "window" in options else ["--initial_local_window", "64"]
    command = ["generate", "--model_name", model_name, "--results", str(tmp_path / "results")]
    assert main([*command, *window, "--prompt", "Hello.", *options.split()]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("prompt", "context", "parts"),
    [
        ("Ask.", "", ("", "Ask.")),
        ("Story.\n\nMore.\n\nAsk.\n", "", ("Story.\n\nMore.", "Ask.")),
        ("Own.\n\nAsk.", "File.\n", ("File.\n\nOwn.", "Ask.")),
    ],
)
def test_the_last_paragraph_is_the_instruction(
    prompt: str, context: str, parts: tuple[str, str]
) -> None:
    assert split_prompt(prompt, context) == parts


@pytest.mark.parametrize("limit", [12, 13, 20, 47, 200])
def test_prompts_fit_whatever_the_limit(tokenizer: Any, limit: int) -> None:
    context = "Ünïcödé wörds 🙂 are many tökens. " * 8
    prompt = fit_prompt(tokenizer, context, "What are they?", limit, cut=True)
    assert len(tokenizer(prompt)["input_ids"]) <= limit
    assert prompt.endswith("What are they?")
    assert (prompt == f"{context}\n\nWhat are they?") == (limit == 200)


def test_an_instruction_is_never_cut(tokenizer: Any) -> None:
    with pytest.raises(PromptError, match=r"instruction alone has \d+ tokens"):
        fit_prompt(tokenizer, "A context.", "Why? " * 30, 20, cut=True)
    assert fit_prompt(tokenizer, "A long context. " * 9, "Why? What?", 5, cut=True) == "Why? What?"


def test_the_example_prints_memory_before_and_after(
    smollm: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(smollm)])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    full, *compressed = capsys.readouterr().out.splitlines()[1:]
    assert "68305" in full
    for line in compressed:
        before, after = line.split(" MiB")[0].split(": ")[-1].split(" -> ")
        assert float(after) < 0.55 * float(before), line
    assert sum("68305" in line for line in compressed) >= 2
