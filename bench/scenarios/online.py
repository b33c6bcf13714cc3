"""Scenario 1, online: ``vllm bench serve`` against a server at fixed KV memory."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench.harness.contenders import contender, with_budgets
from bench.harness.engines import BLOCK_SIZE, Geometry, model_or_bundled
from bench.harness.machine import ROOT
from bench.harness.report import table
from bench.harness.suite import Case, Options, Results, ratio_text
from bench.scenarios.throughput import grouped, paired

DATASETS = ("random", "prefix_repetition", "custom")
LATENCIES = ("ttft", "tpot", "itl")


class Serving:
    """Latencies and throughput that clients see, by contender, dataset, shape and pool."""

    name = "serving"
    title = "Serving at fixed KV memory"

    def cases(self, options: Options) -> list[Case]:
        """Contenders of one comparison are neighbours; every other repeat goes backwards."""
        if options.effort == "short":
            return []  # Starting servers takes longer than the rest has time for.
        datasets, shapes, pools, methods, repeats, requests = {
            "quick": (("random",), ((320, 40),), (2,), ("stock", "knorm/2"), 1, 4),
            "full": (
                DATASETS,
                ((2000, 200), (1000, 1000), (6000, 128)),
                (2, 4),
                ("stock", "fp8", "knorm/8", "pyramid/8", "during/8", "merge/4", "knorm+fp8/4"),
                3,
                24,
            ),
        }[options.effort]
        methods = with_budgets(options.methods or methods, options.budgets)
        requests = options.requests or requests
        found = []
        for data in datasets:
            for prompt, output in options.shapes or shapes:
                for pool in options.pools or pools:
                    group = f"{data}, {prompt}+{output}, pool of {pool}, {requests} requests"
                    for repeat in range(options.repeats or repeats):
                        for method in methods if repeat % 2 == 0 else methods[::-1]:
                            about = {
                                "group": group,
                                "dataset": data,
                                "prompt_tokens": prompt,
                                "output_tokens": output,
                                "pool": pool,
                                "method": method,
                                "repeat": repeat,
                                "requests": requests,
                                "model": options.model,
                            }
                            found.append(Case(f"{group}, {method}, repeat {repeat}", about))
        return found

    def run(self, case: Case) -> dict[str, Any]:
        """Start a server, let vLLM's client measure it, stop it."""
        from bench.harness.server import SERVED_NAME, Poller, serving, warm_up

        about = case.parameters
        prompt, output = about["prompt_tokens"], about["output_tokens"]
        side = contender(about["method"], prompt + output)
        model = model_or_bundled(about["model"])
        kv_bytes = Geometry.of(about["model"]).pool_bytes(about["pool"], prompt + output)
        cached = about["dataset"] == "prefix_repetition"
        options = [
            "--dtype=bfloat16",
            "--enforce-eager",
            f"--block-size={BLOCK_SIZE}",
            f"--kv-cache-memory-bytes={kv_bytes}",
            f"--kv-cache-dtype={side.cache}",
            # A text may have a few tokens more than the ids it was made from.
            f"--max-model-len={prompt + output + BLOCK_SIZE}",
            f"--max-num-seqs={about['pool'] if side.capped else 256}",
            "--enable-prefix-caching" if cached else "--no-enable-prefix-caching",
        ]
        with tempfile.TemporaryDirectory() as directory, serving(side, model, options) as url:
            client = [sys.executable, "-m", "vllm_kvcompress.cli", "bench", "serve"]
            client += [f"--base-url={url}", f"--model={SERVED_NAME}", f"--tokenizer={model}"]
            client += ["--backend=openai", "--endpoint=/v1/completions", "--ignore-eos"]
            client += ["--percentile-metrics=ttft,tpot,itl", "--metric-percentiles=50,99"]
            client += ["--seed=0", "--disable-tqdm", "--save-result"]
            client += [f"--result-dir={directory}", "--result-filename=serve.json"]
            client += _dataset(about, model, Path(directory))
            warm_up(url)
            with Poller(url, kv_bytes) as poller:
                subprocess.run(client, cwd=ROOT, check=True)
            found = json.loads((Path(directory) / "serve.json").read_text())
        if found["completed"] != about["requests"]:
            raise RuntimeError(f"{found['completed']} of {about['requests']} requests completed")
        measured = poller.figures()
        return {
            **about,
            "settings": side.settings,
            "kv_bytes": kv_bytes,
            "seconds": found["duration"],
            "output_tokens_per_second": found["output_throughput"],
            **{f"{kind}_{what}_ms": found[f"{kind}_{what}_ms"] for kind, what in _latencies()},
            **measured,
            "compaction_share": measured["compaction_seconds"] / found["duration"],
        }

    def report(self, results: Results) -> list[str]:
        """A table of each dataset, shape and pool."""
        lines = [
            "`vllm bench serve`, all requests at once: `serve.py` for compressed contenders, "
            "vLLM's own server for the others, on the same KV bytes. TTFT is the time to the "
            "first token, waiting included, TPOT the mean time of a request's further tokens, "
            "ITL the time between two tokens; medians, with the 99th percentile in brackets. "
            "Concurrency and KV bytes are from `/metrics`, read twice a second."
        ]
        for group, rows in grouped(results).items():
            lines += ["", f"{group}, {rows[0]['kv_bytes'] / (1 << 20):.0f} MiB of KV cache:", ""]
            heads = ["", "Output tok/s", "Against stock"]
            heads += [f"{what.upper()}, ms" for what in LATENCIES]
            heads += ["Preemptions", "Peak at once", "KV MiB per request", "Compacting"]
            methods = dict.fromkeys(row["method"] for row in rows)
            lines += table(heads, [_row(method, rows) for method in methods])
        return lines

    def plots(self, results: Results, directory: Path) -> list[Path]:
        """Nothing: the plots are of the offline runs."""
        return []


def _latencies() -> list[tuple[str, str]]:
    return [(kind, what) for what in LATENCIES for kind in ("median", "p99")]


def _row(method: str, rows: list[dict[str, Any]]) -> list[str]:
    own = [row for row in rows if row["method"] == method]

    def median(key: str) -> float:
        return statistics.median(row[key] for row in own)

    ratios = paired(rows, method, "stock", "output_tokens_per_second")
    return [
        f"`{method}`",
        f"{median('output_tokens_per_second'):.1f}",
        ratio_text(ratios) if ratios else "",
        *(f"{median(f'median_{w}_ms'):.0f} ({median(f'p99_{w}_ms'):.0f})" for w in LATENCIES),
        f"{median('preemptions'):.0f}",
        f"{median('peak_concurrency'):.0f}",
        f"{median('kv_bytes_per_request') / (1 << 20):.1f}",
        f"{median('compaction_share'):.1%}" if own[0]["settings"] else "",
    ]


def _dataset(about: dict[str, Any], model: str, directory: Path) -> list[str]:
    """Options of the client that say what it sends."""
    prompt, output, requests = (
        about[key] for key in ("prompt_tokens", "output_tokens", "requests")
    )
    common = [f"--dataset-name={about['dataset']}", f"--num-prompts={requests}"]
    if about["dataset"] == "random":
        return [*common, f"--random-input-len={prompt}", f"--random-output-len={output}"]
    if about["dataset"] == "prefix_repetition":
        return [
            *common,
            f"--prefix-repetition-prefix-len={prompt // 2}",
            f"--prefix-repetition-suffix-len={prompt - prompt // 2}",
            f"--prefix-repetition-num-prefixes={max(1, requests // 4)}",
            f"--prefix-repetition-output-len={output}",
        ]
    path = directory / "texts.jsonl"
    with path.open("w") as lines:
        for text in real_texts(requests, prompt, model):
            lines.write(json.dumps({"prompt": text}) + "\n")
    options = [f"--dataset-path={path}", f"--custom-output-len={output}"]
    return [*common, *options, "--skip-chat-template", "--disable-shuffle"]


def real_texts(requests: int, tokens: int, model: str) -> list[str]:
    """Stretches of Python sources that come with torch, each of so many tokens."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    ids: list[int] = []
    for source in sorted((Path(torch.__file__).parent / "nn").rglob("*.py")):
        if len(ids) >= requests * tokens:
            break
        ids += tokenizer(source.read_text(encoding="utf-8")).input_ids
    if len(ids) < requests * tokens:
        raise RuntimeError(f"torch.nn has only {len(ids)} tokens of sources")
    return [tokenizer.decode(ids[at * tokens : (at + 1) * tokens]) for at in range(requests)]
