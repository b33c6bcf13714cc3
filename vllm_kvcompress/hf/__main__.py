"""``python -m vllm_kvcompress.hf generate``: generate with merging, results as JSON."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from vllm_kvcompress.hf.generate import GenerateError, add_options, run
from vllm_kvcompress.settings import SettingsError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; 2 with one sentence on standard error for what cannot work."""
    parser = argparse.ArgumentParser(
        prog="python -m vllm_kvcompress.hf", description="KV cache compression in transformers."
    )
    commands = parser.add_subparsers(dest="command", required=True)
    add_options(
        commands.add_parser(
            "generate",
            help="generate text with a cache that merges old tokens",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
    )
    try:
        print(run(parser.parse_args(arguments)))
    except (GenerateError, SettingsError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
