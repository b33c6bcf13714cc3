"""Engines for tests: vLLM in this process, with everything a test wants to look at."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.inputs import TokensPrompt


@dataclass
class Generation:
    """Output of one request: its tokens and the log-probability of each."""

    tokens: list[int]
    logprobs: list[float]
    cached_tokens: int | None = None


@dataclass
class Engine:
    """An in-process engine and what happened in it."""

    llm: LLM
    preemptions: list[str] = field(default_factory=list)
    plans: list[Any] = field(default_factory=list)
    kept: list[tuple[Any, int, torch.Tensor]] = field(default_factory=list)

    @property
    def core(self) -> Any:
        return self.llm.llm_engine.engine_core.engine_core

    @property
    def scheduler(self) -> Any:
        return self.core.scheduler

    @property
    def pool(self) -> Any:
        return self.scheduler.kv_cache_manager.block_pool

    @property
    def runner(self) -> Any:
        return self.core.model_executor.driver_worker.worker.model_runner

    def crowd(self) -> None:
        """Admit requests without leaving room for others to grow, so that some are preempted."""
        self.scheduler.kvcompress.promised = lambda *_: 0

    def params(self, max_tokens: int, **added: Any) -> SamplingParams:
        return SamplingParams(
            temperature=0,
            max_tokens=max_tokens,
            ignore_eos=True,
            logprobs=0,
            detokenize=False,
            **added,
        )

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        wishes: Sequence[dict[str, Any]] | None = None,
        **added: Any,
    ) -> list[Generation]:
        """Run prompts (token ids) together, greedily; ``wishes`` are settings of each."""
        params = [
            self.params(max_tokens, **added, extra_args=prefixed(own))
            if own
            else self.params(max_tokens, **added)
            for own in wishes or [{}] * len(prompts)
        ]
        outputs = self.llm.generate(
            [TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts],
            params,
            use_tqdm=False,
        )
        return [
            Generation(
                list(output.outputs[0].token_ids),
                [
                    step[token].logprob
                    for step, token in zip(
                        output.outputs[0].logprobs, output.outputs[0].token_ids, strict=True
                    )
                ],
                output.num_cached_tokens,
            )
            for output in outputs
        ]


def prefixed(wishes: dict[str, Any]) -> dict[str, Any]:
    """Settings of a request as keys of its ``extra_args``."""
    return {f"kvcompress_{key}": value for key, value in wishes.items()}


@contextmanager
def engine(model: Path, kvcompress: dict[str, Any] | None = None, **args: Any) -> Iterator[Engine]:
    """Start an engine, compressed if ``kvcompress`` is given, and stop it afterwards.

    With tensor parallelism the workers are other processes, so no plans are recorded.
    """
    options: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 4096,
        "kv_cache_memory_bytes": 512 << 20,
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "disable_log_stats": True,
        "block_size": 32,
        "seed": 0,
    }
    options.update(args)
    if kvcompress is not None:
        options["additional_config"] = {"kvcompress": kvcompress}
    running = Engine(LLM(str(model), **options))
    scheduler = running.scheduler
    preempt = scheduler._preempt_request

    def count(request: Any, *rest: Any, **named: Any) -> None:
        running.preemptions.append(request.request_id)
        preempt(request, *rest, **named)

    scheduler._preempt_request = count
    if kvcompress is not None and "tensor_parallel_size" not in args:

        def keep(plan: Any, layer: int, kept: torch.Tensor) -> None:
            running.kept.append((plan, layer, kept.clone()))

        def note(plan: Any, layer: int, keys: torch.Tensor) -> None:
            if not running.plans or running.plans[-1] is not plan:
                running.plans.append(plan)

        running.runner.kvcompress.compactor.on_kept = keep
        running.runner.kvcompress.compactor.on_written = note
    try:
        yield running
    finally:
        running.llm.llm_engine.engine_core.shutdown()
        running.llm = None  # type: ignore[assignment]
        gc.collect()
        cleanup_dist_env_and_memory()


def assert_same(found: Generation, wanted: Generation, tolerance: float = 1e-3) -> int:
    """Same tokens, or log-probabilities within ``tolerance`` where a near-tie flips.

    Returns the number of steps compared: nothing can be said of those after a flip.
    """
    pairs = zip(found.tokens, wanted.tokens, found.logprobs, wanted.logprobs, strict=True)
    for step, (token, other, logprob, other_logprob) in enumerate(pairs):
        difference = abs(logprob - other_logprob)
        assert difference <= tolerance, (
            f"step {step}: token {token} with {logprob:.5f}, expected {other} with "
            f"{other_logprob:.5f}"
        )
        if token != other:
            return step + 1
    return len(found.tokens)
