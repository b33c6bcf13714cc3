"""What a model loses by compression: ``python -m bench.quality``.

    python -m bench.quality --short                    # under 20 minutes on two cores
    python -m bench.quality --url http://HOST:8000     # any running server of ours
    python -m bench.quality --model MODEL              # any model that vLLM can serve
    python -m bench.quality report FILE... --stem DIR/NAME

Without ``--url`` it starts ``serve.py`` itself, once for all methods that drop tokens and once
for each that merges (a server has one of these); for the bundled model also with all its layers
alike. A run that was stopped goes on where it was:
rows that ``--output`` already has are not asked again. See docs/quality.md.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from bench.quality.endpoint import Endpoint, EndpointError, ServerInfo
from bench.quality.jobs import Job, RowFile, make_jobs
from bench.quality.options import UsageError, plan_of, run_parser, tasks_of
from bench.quality.plan import Plan
from bench.quality.report import write_report
from bench.quality.rows import DURING, RowsError, read_rows
from bench.quality.runner import Runner
from bench.quality.server import ServerError, serving
from bench.quality.servers import OwnServer, own_servers
from bench.quality.tasks import Task
from bench.quality.tasks.case import TaskError, Tokenizer
from bench.quality.tasks.texts import VARIABLE
from vllm_kvcompress.bundled import MODEL_NAME, BundledModelError, model_directory

RESULTS = Path(__file__).parents[1] / "results"
OWN_OPTIONS = ("--kvcompress-finished-requests", "0")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command.

    Parameters
    ----------
    argv : sequence of str or None
        Arguments without the program's name.

    Returns
    -------
    int
        Exit code: 2 for what cannot be done.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["report"]:
            return _report(arguments[1:])
        return _run(run_parser(__doc__ or "").parse_args(arguments))
    except* (
        UsageError,
        EndpointError,
        ServerError,
        TaskError,
        RowsError,
        BundledModelError,
    ) as errors:
        first: BaseException = errors
        while isinstance(first, BaseExceptionGroup):
            first = first.exceptions[0]
        print(f"quality: {first}", file=sys.stderr)
    except* KeyboardInterrupt:
        print("quality: stopped; the same command goes on from here.", file=sys.stderr)
    return 2


def _report(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.quality report",
        description="Make the table and the plots of any number of result files.",
    )
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--stem", type=Path, help="directory and start of the names of what it "
                        "writes (default: that of the first file)")  # fmt: skip
    found = parser.parse_args(arguments)
    for file in found.files:
        if not file.is_file():
            raise UsageError(f"{file} is not a file.")
    rows = list(read_rows(found.files))
    for path in write_report(rows, found.stem or found.files[0].with_suffix("")):
        print(path)
    return 0


def _run(arguments: argparse.Namespace) -> int:
    if arguments.texts:
        os.environ[VARIABLE] = arguments.texts
    tasks = tasks_of(arguments)
    plan = plan_of(arguments, tasks)
    output = arguments.output
    if arguments.url:
        output = asyncio.run(_ask(arguments, plan, tasks, arguments.url, plan.methods, output))
    else:
        model = arguments.model or str(model_directory())
        name = Path(model).name if arguments.model else MODEL_NAME
        output = output or RESULTS / f"quality-{name}.jsonl"
        tokenizer = _tokenizer(arguments.tokenizer or model)
        for server in own_servers(plan, model, arguments):
            own = replace(plan, variant=server.variant)
            info = ServerInfo(name, model, None, server.methods, {}, server.shares)
            if _jobs(own, tasks, tokenizer, info, server.methods, output):
                _ask_own(arguments, own, tasks, server, output)
    if not arguments.no_report:
        for path in write_report(list(read_rows([output])), output.with_suffix("")):
            print(path)
    return 0


def _ask_own(
    arguments: argparse.Namespace,
    plan: Plan,
    tasks: dict[str, Task],
    server: OwnServer,
    output: Path,
) -> None:
    """Start a server and ask it."""
    options = ["--dtype", arguments.dtype, "--enforce-eager"]
    options += ["--kvcompress-method", server.method]
    if any(DURING in protocols for protocols in plan.tasks.values()):
        options += ["--kvcompress-phase", DURING]
    # Accounts of finished requests are not kept: they come with the answers.
    options += [*OWN_OPTIONS, *server.options]
    log = output.with_suffix(f".{server.method.replace('+', '-')}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    print(f"starting serve.py {shlex.join(options)} (log: {log})", file=sys.stderr)
    with serving(arguments.model, options, log) as url:
        asyncio.run(_ask(arguments, plan, tasks, url, server.methods, output))
    log.unlink()


def _jobs(
    plan: Plan,
    tasks: dict[str, Task],
    tokenizer: Tokenizer,
    info: ServerInfo,
    methods: Sequence[str],
    output: Path,
) -> list[Job]:
    """What is left to ask a server that does not run yet."""
    done = RowFile(output)
    done.close()
    return make_jobs(plan, list(tasks.values()), tokenizer, info, methods, done)


async def _ask(
    arguments: argparse.Namespace,
    plan: Plan,
    tasks: dict[str, Task],
    url: str,
    methods: Sequence[str],
    output: Path | None,
) -> Path:
    async with Endpoint(url, arguments.api_key) as endpoint:
        info = await endpoint.info(arguments.model if arguments.url else None)
        methods = _possible(plan, info, methods, url)
        output = output or RESULTS / f"quality-{info.label}.jsonl"
        done = RowFile(output)
        try:
            tokenizer = _tokenizer(arguments.tokenizer or info.root)
            jobs = make_jobs(plan, list(tasks.values()), tokenizer, info, methods, done)
            runner = Runner(plan, endpoint, info, done, arguments.concurrency)
            await runner.run(jobs, _Progress())
        finally:
            done.close()
    return output


def _possible(plan: Plan, info: ServerInfo, methods: Sequence[str], url: str) -> list[str]:
    """What a server can be asked for; what it cannot is said, and left out."""
    phase = info.settings.get("phase")
    during = any(DURING in protocols for protocols in plan.tasks.values())
    if info.methods and ((phase == DURING) != during or phase == "decode"):
        wanted = DURING if during else "after_prefill"
        raise UsageError(
            f"{url} compresses with phase={phase}, and these protocols need phase={wanted}."
        )
    found = [name for name in methods if name in info.methods]
    if len(found) < len(methods):
        left = ", ".join(name for name in methods if name not in found)
        print(f"{url} cannot be asked for {left}; left out.", file=sys.stderr)
    return found


def _tokenizer(name: str) -> Tokenizer:
    from transformers import AutoTokenizer

    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"the tokenizer of {name} cannot be loaded here; name its directory with --tokenizer "
            f"({str(error).splitlines()[0]})."
        ) from error
    return tokenizer


class _Progress:
    """Prints one line a case with the time that is left."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    def __call__(self, done: int, of: int, what: str) -> None:
        passed = time.monotonic() - self.start
        left = passed / done * (of - done)
        print(
            f"[{done}/{of}] {what}; {passed / 60:.1f} min, about {left / 60:.1f} left",
            file=sys.stderr,
            flush=True,
        )


if __name__ == "__main__":
    # A server started here ends with the command, also when that is ended by kill.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
