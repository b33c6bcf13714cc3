"""Does compression suit a model? Measures it in a few minutes, in plain transformers.

    python -m vllm_kvcompress.check MODEL
    python -m vllm_kvcompress.check MODEL --texts mine.txt --plot layers.png --json check.json

MODEL is a directory or a name that transformers can load. Contexts are cut out of the
documentation that Python ships, or out of files of yours, with facts planted in them. Each is
computed exactly and compressed by each method; then the model continues the text and answers
questions about the facts, and what it loses against the full cache is compared. The rank
correlation tells how well a method's score foretells the attention that each token receives,
per layer and KV head. Then each layer alone is compressed; if a few lose far more than the others,
all is measured again with these whole. The last lines are settings to paste, or "do not use".
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_kvcompress.check.dense import Shape
from vllm_kvcompress.check.measure import measure
from vllm_kvcompress.check.recommend import advise
from vllm_kvcompress.check.report import as_json, markdown, plot
from vllm_kvcompress.check.texts import built_in_text, samples, text_of
from vllm_kvcompress.methods import METHODS
from vllm_kvcompress.settings import parse_settings

SHARES = (0.25, 0.5, 0.75, 0.9)


def _parser() -> argparse.ArgumentParser:
    defaults = parse_settings({})
    summary, _, more = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m vllm_kvcompress.check",
        description=summary,
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--texts", type=Path, nargs="+", default=[], help="files instead")
    parser.add_argument("--contexts", type=int, default=3, help="how many (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=1500, help="of each (default: %(default)s)")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--shares", type=float, nargs="+", default=list(SHARES))
    parser.add_argument("--sinks", type=int, default=defaults.sink_tokens)
    parser.add_argument("--recent", type=int, default=defaults.recent_tokens)
    parser.add_argument("--recent-ratio", type=float, default=defaults.recent_ratio)
    parser.add_argument("--seed", type=int, default=0, help="of texts, facts and random methods")
    parser.add_argument("--dtype", default="float32", help="of the model (default: %(default)s)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    parser.add_argument("--markdown", type=Path, help="file for what is also printed")
    parser.add_argument("--plot", type=Path, help="file for a plot per layer; matplotlib")
    return parser


def _wrong(args: argparse.Namespace) -> str | None:
    if not all(0 < share < 1 for share in args.shares):
        return "--shares are shares removed, between 0 and 1"
    if not 0 <= args.recent_ratio <= 1:
        return "--recent-ratio is a share of the tokens kept, from 0 to 1"
    least = round((1 - max(args.shares)) * args.tokens)
    if least < args.sinks + args.recent:
        return (
            f"{max(args.shares):.0%} removed of --tokens {args.tokens} leaves {least}, fewer than "
            f"--sinks and --recent keep ({args.sinks + args.recent}); ask for longer contexts"
        )
    if args.contexts < 1:
        return "--contexts must be at least 1"
    missing = [str(file) for file in args.texts if not file.is_file()]
    if missing:
        return f"no such file: {', '.join(missing)}"
    return None


def load(name: str, dtype: str, device: str) -> tuple[Any, Any]:
    """Model and tokenizer."""
    kind = getattr(torch, dtype, None)
    if not isinstance(kind, torch.dtype):
        raise ValueError(f"--dtype {dtype} is not a type of torch, such as float32 or bfloat16")
    tokenizer = AutoTokenizer.from_pretrained(name)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=kind).to(device).eval()
    return model, tokenizer


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; 0 if compression can be used, 1 if not, 2 if it could not be checked."""
    args = _parser().parse_args(arguments)
    wrong = _wrong(args)
    if wrong is not None:
        print(f"error: {wrong}.", file=sys.stderr)
        return 2
    try:
        text = text_of(args.texts) if args.texts else built_in_text()
        model, tokenizer = load(args.model, args.dtype, args.device)
        cases = samples(
            text,
            lambda part: tokenizer.encode(part, add_special_tokens=False),
            args.contexts,
            args.tokens,
            continuation=128,
            seed=args.seed,
        )
        findings = measure(
            model,
            Path(args.model).name,
            cases,
            {name: METHODS[name](seed=args.seed) for name in args.methods},
            sorted(set(args.shares)),
            Shape(args.sinks, args.recent, args.recent_ratio),
            lambda line: print(line, file=sys.stderr, flush=True),
        )
        advice = advise(findings)
        if args.plot:
            plot(findings, args.plot)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    told = markdown(findings, advice)
    if args.json:
        args.json.write_text(as_json(findings, advice))
    if args.markdown:
        args.markdown.write_text(told)
    print(told)
    return 0 if advice.use else 1


if __name__ == "__main__":
    sys.exit(main())
