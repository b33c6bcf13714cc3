"""The ``generate`` command: a model, prompts and a merging cache."""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers

from vllm_kvcompress import __version__
from vllm_kvcompress.hf.cache import CompressedCache
from vllm_kvcompress.hf.plan import recent_window
from vllm_kvcompress.hf.prompts import PromptError, fit_prompt, split_prompt
from vllm_kvcompress.settings import Settings, parse_settings

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False, "num_beams": 1},
    "sample": {"do_sample": True, "num_beams": 1},
    "beam_search": {"do_sample": False},
}


class GenerateError(ValueError):
    """An option that cannot be used; the message is one sentence for the user."""


def add_options(parser: ArgumentParser) -> None:
    """Add the command's options; those of the model are named as transformers names them."""
    add = parser.add_argument
    add("--model_name", required=True, help="name or directory of the model")
    add("--prompt", required=True, nargs="+", help="prompts; the last paragraph is the instruction")
    add("--context", type=Path, help="file with a context to put before every prompt")
    add("--compress_context", action="store_true", help="cut the middle of an over-long context")
    add("--decoding_strategy", choices=STRATEGIES, default="greedy", help="how to choose tokens")
    add("--num_beams", type=int, default=4, help="beams of beam_search")
    add("--seed", type=int, default=0, help="seed of sample")
    add("--initial_local_window", type=int, default=512, help="slots of the first layer, L0")
    add("--steepness_coefficient", type=float, default=1.0, help="beta of the pyramid; 1 is flat")
    add("--sink_tokens", type=int, default=4, help="first tokens, never merged")
    add("--recent_tokens", type=int, help="latest tokens, never merged; if not set, half the room")
    add("--seq_pooling_type", choices=("mean", "max", "best"), default="mean", help="pooling")
    add("--merge_weighting", choices=("count", "none"), default="count", help="of merged slots")
    add("--interval", type=int, default=32, help="generated tokens between two compactions")
    add("--skip_prefill_compression", action="store_true", help="merge generated tokens only")
    add("--max_length", type=int, help="tokens of prompt and answer (as many as the model takes)")
    add("--max_new_tokens", type=int, default=128, help="tokens of the answer")
    add("--batch_size", type=int, default=1, help="prompts at once")
    add("--device", default="cpu", help="device of the model")
    add("--results", type=Path, default=Path("results"), help="folder for the results")


def run(options: Namespace) -> Path:
    """Generate, and write what came of it.

    Returns
    -------
    Path
        The results file.

    Raises
    ------
    GenerateError, SettingsError
        For options that cannot be used.
    OSError
        For a model or a file that cannot be read.
    """
    for name in ("batch_size", "max_new_tokens", "num_beams"):
        if getattr(options, name) < 1:
            raise GenerateError(f"--{name} {getattr(options, name)} is not allowed: at least 1.")
    try:
        torch.empty(0, device=options.device)
    except (RuntimeError, AssertionError) as error:
        raise GenerateError(f"--device {options.device} cannot be used: {error}") from None
    config = transformers.AutoConfig.from_pretrained(options.model_name)
    settings = merge_settings(options, config)
    CompressedCache(settings, config=config)  # refuses before the model is loaded
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.model_name, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    prompts = _prompts(options, tokenizer, config)
    model = transformers.AutoModelForCausalLM.from_pretrained(options.model_name)
    model = model.eval().to(options.device)
    torch.manual_seed(options.seed)
    results: dict[str, Any] = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "vllm_kvcompress": __version__,
            "transformers": transformers.__version__,
            "torch": torch.__version__,
        },
        "options": {name: _plain(value) for name, value in vars(options).items()},
        "settings": settings.model_dump(),
        "answers": [],
        "batches": [],
    }
    for start in range(0, len(prompts), options.batch_size):
        batch = prompts[start : start + options.batch_size]
        answers, figures = _generate(options, settings, model, tokenizer, batch)
        results["answers"] += answers
        results["batches"].append(figures)
    options.results.mkdir(parents=True, exist_ok=True)
    stamp = datetime.now(UTC).strftime("%Y%m%d-%H%M%S-%f")
    path = options.results / f"{options.decoding_strategy}-{stamp}.json"
    path.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def merge_settings(options: Namespace, config: Any) -> Settings:
    """The settings that the options make.

    Raises
    ------
    SettingsError
        For sizes that cannot be used.
    """
    text = config.get_text_config(decoder=True)
    window, beta = options.initial_local_window, options.steepness_coefficient
    layers = (text.num_hidden_layers, text.num_hidden_layers - 1)
    sinks = 0 if options.skip_prefill_compression else options.sink_tokens
    longest = text.max_position_embeddings
    recent = recent_window(window, beta, sinks, options.recent_tokens, layers, longest)
    return parse_settings(
        {
            "method": "merge",
            "budget": window,
            "pyramid_beta": beta,
            "sink_tokens": options.sink_tokens,
            "recent_tokens": recent,
            "pooling": options.seq_pooling_type,
            "merge_weighting": options.merge_weighting,
            "interval": options.interval,
            "phase": "decode" if options.skip_prefill_compression else "after_prefill",
        }
    )


def _prompts(options: Namespace, tokenizer: Any, config: Any) -> list[str]:
    most = config.get_text_config(decoder=True).max_position_embeddings
    total = most if options.max_length is None else options.max_length
    if not options.max_new_tokens < total <= most:
        raise GenerateError(
            f"--max_length {total} is not allowed: the model takes {most} tokens, "
            f"{options.max_new_tokens} of them for the answer (--max_new_tokens)."
        )
    context = options.context.read_text(encoding="utf-8") if options.context else ""
    limit = total - options.max_new_tokens
    try:
        return [
            fit_prompt(tokenizer, *split_prompt(prompt, context), limit, options.compress_context)
            for prompt in options.prompt
        ]
    except PromptError as error:
        raise GenerateError(str(error)) from None


def _generate(
    options: Namespace, settings: Settings, model: Any, tokenizer: Any, prompts: list[str]
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
    cache = CompressedCache(settings, config=model.config)
    strategy = {"num_beams": options.num_beams} | STRATEGIES[options.decoding_strategy]
    started = time.perf_counter()
    output = model.generate(
        **inputs,
        past_key_values=cache,
        max_new_tokens=options.max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        **strategy,
    )
    seconds = time.perf_counter() - started
    answers = []
    for prompt, mask, ids in zip(prompts, inputs["attention_mask"], output, strict=True):
        text = tokenizer.decode(ids[len(mask) :], skip_special_tokens=True)
        answers.append({"prompt": prompt, "prompt_tokens": int(mask.sum()), "text": text})
    figures = {
        "prompts": len(prompts),
        "steps": output.shape[1] - inputs["input_ids"].shape[1],
        "seconds": round(seconds, 3),
        "kv_cache_bytes": cache.nbytes,
        "uncompressed_bytes": cache.full_nbytes,
    }
    return answers, figures


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value
