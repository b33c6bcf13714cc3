"""What merging costs and gives beside eviction, on a real engine, as JSON.

    python -m bench.merging            # about 40 minutes on one core
    python -m bench.merging --quick    # short prompts, only to see that it works
    python -m bench.merging --markdown FILE    # table of an earlier run's JSON

A batch of long prompts of real text (Python sources that come with torch) on the bundled
model, with the same budget for every method. Each method runs beside a stock engine in one
process, in alternating order. For each:

* ``blocks_freed_share``: KV blocks in use after the prompts have been computed and compacted,
  by the scheduler's block pool, as a share of those in use in stock vLLM at the same step,
  taken from 1.
* ``decode_time_ratio_to_stock``: median time of the steps in which every request of the batch
  decodes and none compacts, over the same of the stock run next to it.
* ``compaction_share_of_time``: of the whole run, prompts included.
* ``logprob_of_stock_tokens``, ``logprob_of_text``: mean log-probability that the model gives,
  under each method, to the tokens that the uncompressed model chose (greedily) and to those
  with which the text really goes on, when it is fed these tokens. The first token after a
  prompt is left out: it is computed before anything is compressed. Natural logarithm, higher
  is better; ``stock`` is the same of the uncompressed model.
* ``leading_tokens_as_stock``: tokens until the method's own greedy output first differs from
  that of the uncompressed model, mean over the requests. In bfloat16 near ties flip by chance.

Few tokens of one kind of text and one small model: enough to see what breaks, not to rank
methods that are close.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

from bench.harness.engines import BLOCK_SIZE, make_engine
from bench.harness.machine import in_its_own_process, machine
from vllm_kvcompress.bundled import model_directory

CONTENDERS: dict[str, dict[str, Any]] = {
    "knorm": {"method": "knorm"},
    "merge, count": {"method": "merge", "merge_weighting": "count"},
    "merge, none": {"method": "merge", "merge_weighting": "none"},
    "knorm+merge, count": {"method": "knorm+merge", "merge_weighting": "count"},
    "knorm+merge, none": {"method": "knorm+merge", "merge_weighting": "none"},
}
"""Settings of each contender, beside the budget."""


class Workload(NamedTuple):
    """What every contender is given."""

    requests: int
    prompt_tokens: int
    output_tokens: int
    budget: int
    kv_bytes: int


FULL = Workload(4, 4000, 64, 512, 448 << 20)
QUICK = Workload(2, 700, 12, 384, 96 << 20)

FORCED = "forced_tokens"


class ForcedTokens(AdapterLogitsProcessor):
    """Makes a request produce given tokens; log-probabilities are taken before it."""

    def is_argmax_invariant(self) -> bool:
        """Whether greedy sampling may skip it."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        """Forces the tokens of ``extra_args``, if there are any."""
        tokens = (params.extra_args or {}).get(FORCED)
        if tokens is None:
            return None

        def force(output: list[int], logits: torch.Tensor) -> torch.Tensor:
            token = tokens[len(output)]
            logits.fill_(float("-inf"))
            logits[token] = 0
            return logits

        return force


@dataclass
class Run:
    """What one run of the batch gave.

    Attributes
    ----------
    tokens : list of (list of int)
        By request.
    logprobs : list of (list of float)
        Of these tokens, before any was forced.
    blocks : int
        Blocks in use once every prompt was computed and compacted.
    step_seconds : float
        Median of the steps in which all requests decode.
    steps : int
        How many these were.
    seconds : float
        Of the whole run.
    """

    tokens: list[list[int]]
    logprobs: list[list[float]]
    blocks: int
    step_seconds: float
    steps: int
    seconds: float


def make_texts(requests: int, tokens: int) -> list[list[int]]:
    """Starts of source files, the same for every contender and version of torch."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_directory())
    texts: list[list[int]] = []
    for source in sorted((Path(torch.__file__).parent / "nn").rglob("*.py")):
        if len(texts) == requests:
            break
        text = source.read_text(encoding="utf-8")
        # No token is shorter than a character on average; this only spares small files.
        if len(text) > 2 * tokens and len(ids := tokenizer(text[: 20 * tokens]).input_ids) > tokens:
            texts.append(ids[:tokens])
    assert len(texts) == requests, "too few long files"
    return texts


def run(
    engine: LLM,
    prompts: list[list[int]],
    output_tokens: int,
    forced: list[list[int]] | None = None,
) -> Run:
    """Run a batch step by step."""
    llm = engine.llm_engine
    scheduler = llm.engine_core.engine_core.scheduler
    pool = scheduler.kv_cache_manager.block_pool
    started = time.perf_counter()
    for index, prompt in enumerate(prompts):
        extra = {FORCED: forced[index]} if forced is not None else None
        params = SamplingParams(
            temperature=0,
            max_tokens=output_tokens,
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
            extra_args=extra,
        )
        llm.add_request(str(index), TokensPrompt(prompt_token_ids=prompt), params)
    counts = [0] * len(prompts)
    outputs: dict[int, Any] = {}
    blocks, steps = 0, []
    while llm.has_unfinished_requests():
        # A request's first token comes with its prompt, and it compacts before its second.
        decoding = min(counts) >= 2 and max(counts) < output_tokens
        before = time.perf_counter()
        for output in llm.step():
            # vLLM adds something to a request's name within, not in its outputs.
            outputs[int(output.request_id)] = output.outputs[0]
            counts[int(output.request_id)] = len(output.outputs[0].token_ids)
        if decoding:
            steps.append(time.perf_counter() - before)
        if not blocks and min(counts) >= 2:
            blocks = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()
            assert max(counts) < output_tokens, "a request had finished: give more output tokens"
    seconds = time.perf_counter() - started
    ordered = [outputs[index] for index in range(len(prompts))]
    return Run(
        tokens=[list(output.token_ids) for output in ordered],
        logprobs=[
            [step[token].logprob for step, token in zip(o.logprobs, o.token_ids, strict=True)]
            for o in ordered
        ],
        blocks=blocks,
        step_seconds=statistics.median(steps),
        steps=len(steps),
        seconds=seconds,
    )


def mean_logprob(found: Run) -> float:
    """Mean log-probability of all tokens but each request's first."""
    return statistics.fmean(logprob for own in found.logprobs for logprob in own[1:])


def leading(tokens: list[int], others: list[int]) -> int:
    """Tokens until two outputs first differ."""
    pairs = zip(tokens, others, strict=True)
    return next((i for i, (one, other) in enumerate(pairs) if one != other), len(tokens))


def compare(name: str, load: Workload, pairs: int) -> dict[str, Any]:
    """One contender beside stock vLLM, in this process."""
    stock, own = (
        make_engine(settings, load.kv_bytes, logits_processors=[ForcedTokens])
        for settings in (None, {**CONTENDERS[name], "budget": load.budget})
    )
    length = load.prompt_tokens + load.output_tokens
    texts = make_texts(load.requests, length)
    prompts = [text[: load.prompt_tokens] for text in texts]
    rest = [text[load.prompt_tokens :] for text in texts]
    for engine in (stock, own):
        run(engine, [prompts[0][:64]], 8)

    def compaction_seconds() -> float:
        (totals,) = own.collective_rpc("kvcompress_totals")
        return totals["seconds"]

    ratios, shares, runs = [], [], []
    for pair in range(pairs):
        found: dict[str, Run] = {}
        for side in ("stock", "own") if pair % 2 == 0 else ("own", "stock"):
            if side == "stock":
                found[side] = run(stock, prompts, load.output_tokens)
                continue
            before = compaction_seconds()
            found[side] = run(own, prompts, load.output_tokens)
            shares.append((compaction_seconds() - before) / found[side].seconds)
        ratios.append(found["own"].step_seconds / found["stock"].step_seconds)
        runs.append(found)
    first = runs[0]
    greedy = [
        leading(mine, theirs)
        for mine, theirs in zip(first["own"].tokens, first["stock"].tokens, strict=True)
    ]
    fed = {
        "logprob_of_stock_tokens": {
            "stock": mean_logprob(first["stock"]),
            "own": mean_logprob(run(own, prompts, load.output_tokens, first["stock"].tokens)),
        },
        "logprob_of_text": {
            side: mean_logprob(run(engine, prompts, load.output_tokens, rest))
            for side, engine in (("stock", stock), ("own", own))
        },
    }
    (totals,) = own.collective_rpc("kvcompress_totals")
    assert totals["compactions"] > 0, "nothing was compressed"
    return {
        "settings": {**CONTENDERS[name], "budget": load.budget},
        "blocks": {side: run_.blocks for side, run_ in first.items()},
        "blocks_freed_share": 1 - first["own"].blocks / first["stock"].blocks,
        "decode_step_seconds": {
            side: statistics.median(pair[side].step_seconds for pair in runs)
            for side in ("stock", "own")
        },
        "decode_steps_per_run": first["own"].steps,
        "decode_time_ratio_to_stock": {
            "median": statistics.median(ratios),
            "min": min(ratios),
            "max": max(ratios),
            "pairs": pairs,
        },
        "compaction_share_of_time": statistics.median(shares),
        **fed,
        "leading_tokens_as_stock": statistics.fmean(greedy),
    }


def markdown(report: dict[str, Any]) -> str:
    """Table of a report."""
    about, load = report["machine"], report["workload"]
    found = report["contenders"]
    lines = [
        f"{load['requests']} prompts of {load['prompt_tokens']} tokens, budget {load['budget']}, "
        f"{load['output_tokens']} decoded tokens each: {load['model']}, `{report['command']}`, "
        f"{about['cpu']}, {about['date']}.",
        "",
        "| | KV blocks freed | Decode time, stock = 1 | Time spent compacting "
        "| Log-probability of stock's tokens | of the text | Leading tokens as stock |",
        "|---|---|---|---|---|---|---|",
    ]
    fed = ("logprob_of_stock_tokens", "logprob_of_text")
    stock = next(iter(found.values()))
    cells = " | ".join(f"{stock[key]['stock']:.3f}" for key in fed)
    lines.append(f"| stock vLLM | 0 | 1 | | {cells} | {load['output_tokens']} |")
    for name, row in found.items():
        ratio = row["decode_time_ratio_to_stock"]
        cells = " | ".join(f"{row[key]['own']:.3f}" for key in fed)
        lines.append(
            f"| `{name}` | {row['blocks_freed_share']:.0%} "
            f"| {ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f}) "
            f"| {row['compaction_share_of_time']:.1%} | {cells} "
            f"| {row['leading_tokens_as_stock']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run everything, or the one part that a child process was asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short prompts only")
    parser.add_argument("--prompt-tokens", type=int, help=f"default {FULL.prompt_tokens}")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each, beside stock")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="table of this JSON")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    options = parser.parse_args()
    load = QUICK if options.quick else FULL
    if options.prompt_tokens is not None:
        load = load._replace(prompt_tokens=options.prompt_tokens)
    pairs = 1 if options.quick else options.pairs

    if options.markdown is not None:
        print(markdown(json.loads(options.markdown.read_text())))
        return
    if options.part:
        print(json.dumps(compare(options.part, load, pairs)))
        return
    report: dict[str, Any] = {
        "command": " ".join(["python -m bench.merging", *sys.argv[1:]]),
        "machine": machine(),
        "workload": {
            **load._asdict(),
            "block_size": BLOCK_SIZE,
            "model": "SmolLM2-135M-Instruct, bfloat16",
            "text": "sources of torch.nn",
        },
        "contenders": {},
    }
    for name in CONTENDERS:
        arguments = ["--part", name, "--pairs", str(pairs), *(["--quick"] * options.quick)]
        arguments += ["--prompt-tokens", str(load.prompt_tokens)]
        report["contenders"][name] = in_its_own_process(*arguments, module="bench.merging")
        print(f"{name} done", file=sys.stderr)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
