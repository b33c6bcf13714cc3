"""Run test cases, each in an engine of its own: ``run_case.py CASES.json RESULTS.json``.

Cases are described in :mod:`gpu_path.harness`, which starts this script with the
environment that selects runner, scheduler and attention backend.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

from vllm import LLM, SamplingParams, TokensPrompt
from vllm.distributed import cleanup_dist_env_and_memory

from vllm_kvcompress import plugin


class Recorder:
    """What the engine does, in order: plans, kept tokens and preemptions."""

    def __init__(self, llm: LLM, crowd: bool) -> None:
        self.core = llm.llm_engine.engine_core.engine_core
        self.scheduler = self.core.scheduler
        self.runner = self.core.model_executor.driver_worker.worker.model_runner
        self.plans: list[dict[str, Any]] = []
        self.preemptions = 0
        self._preempt = self.scheduler._preempt_request
        self.scheduler._preempt_request = self._count_preemption
        if crowd:
            # Admit without leaving room for others to grow, so that some are preempted.
            self.scheduler.kvcompress.promised = lambda *_: 0
        if self.runner.kvcompress is not None:
            self.runner.kvcompress.compactor.on_kept = self._on_kept
            # Plans that only merge keep no tokens to be told of.
            self.runner.kvcompress.compactor.on_written = lambda plan, *_: self._entry(plan)

    def _count_preemption(self, *args: Any, **kwargs: Any) -> Any:
        self.preemptions += 1
        return self._preempt(*args, **kwargs)

    def _on_kept(self, plan: Any, layer: int, kept: Any) -> None:
        self._entry(plan)["kept"][layer] = kept.tolist()

    def _entry(self, plan: Any) -> dict[str, Any]:
        """What is recorded of a plan; it is the latest one."""
        entry = {
            "request": plan.request_id.split("-")[0],
            "group": plan.group,
            "position": plan.position,
            "sources": len(plan.sources),
            "destinations": len(plan.destinations),
            "holes": plan.holes,
            "in_place": len(set(plan.sources) & set(plan.destinations)),
        }
        if not self.plans or self.plans[-1]["plan"] is not plan:
            self.plans.append({"plan": plan, **entry, "kept": {}})
        return self.plans[-1]

    def take(self) -> dict[str, Any]:
        """What happened since the last call, ready for JSON."""
        plans, self.plans = self.plans, []
        preemptions, self.preemptions = self.preemptions, 0
        for entry in plans:
            del entry["plan"]
        return {"plans": plans, "preemptions": preemptions}

    def classes(self) -> dict[str, Any]:
        """Names of the classes really in use."""
        groups = [group for groups in self.runner.attn_groups for group in groups]
        cache = next(iter(self._layers().values())).kv_cache
        return {
            "runner": [cls.__module__ for cls in type(self.runner).__mro__],
            "scheduler": [cls.__name__ for cls in type(self.scheduler).__mro__],
            "async": bool(self.core.async_scheduling),
            "attention": sorted({group.backend.get_name() for group in groups}),
            "groups": len(self.runner.attn_groups),
            "compressed_groups": sum(hasattr(group, "holes") for group in groups),
            "layout": self.core.vllm_config.cache_config.get_resolved_kv_cache_layout().name,
            "page_strides": list(cache.stride()),
            "pages": sorted({self._kind(band) for band in self._bands()}),
            "block_size": self.core.vllm_config.cache_config.block_size,
        }

    def _bands(self) -> list[Any]:
        connected = self.runner.kvcompress
        return [] if connected is None else list(connected.compactor.groups.values())

    def _kind(self, band: Any) -> str:
        """What scores and moves pages, and whether it did not give up on itself."""
        return type(band).__name__ + (", working" if getattr(band, "working", False) else "")

    def _layers(self) -> dict[str, Any]:
        context = self.core.vllm_config.compilation_config.static_forward_context
        return {name: layer for name, layer in context.items() if hasattr(layer, "kv_cache")}

    def always_shift(self) -> None:
        """Take the branch that GPUs take: persistent buffers whether or not there are holes."""
        for groups in self.runner.attn_groups:
            for group in groups:
                if hasattr(group, "holes"):
                    group._always = True

    def free_blocks(self) -> int:
        """Blocks in the pool that no request holds."""
        return self.scheduler.kv_cache_manager.block_pool.get_num_free_blocks()


def run(llm: LLM, recorder: Recorder, case: dict[str, Any], step: dict[str, Any]) -> dict[str, Any]:
    """Serve one batch of the case's prompts to the end, and report on it."""
    engine = llm.llm_engine
    started = time.perf_counter()
    abort = {int(index): tokens for index, tokens in step.get("abort", {}).items()}
    ids: dict[str, int] = {}
    for index in step["requests"]:
        sampling = SamplingParams(
            temperature=0.0,
            ignore_eos=True,
            detokenize=False,
            logprobs=3,
            **{**case.get("sampling", {}), **case.get("per_request", {}).get(str(index), {})},
        )
        prompt = TokensPrompt(prompt_token_ids=case["prompts"][index])
        ids[str(engine.add_request(f"r{index}", prompt, sampling))] = index
    outputs: dict[int, Any] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            index = int(output.request_id.split("-")[0].removeprefix("r"))
            outputs[index] = output
            if index in abort and len(output.outputs[0].token_ids) >= abort[index]:
                del abort[index]
                engine.abort_request([f"r{index}"])
    requests = {}
    for index, output in outputs.items():
        completion = output.outputs[0]
        requests[str(index)] = {
            "tokens": list(completion.token_ids),
            "finished": output.finished,
            "cached": output.num_cached_tokens,
            "logprobs": [
                at[token].logprob
                for token, at in zip(completion.token_ids, completion.logprobs or [], strict=True)
            ],
            "top": [
                sorted((value.logprob for value in at.values()), reverse=True)[:3]
                for at in completion.logprobs or []
            ],
        }
    return {
        "requests": requests,
        **recorder.take(),
        "free_blocks": recorder.free_blocks(),
        "seconds": time.perf_counter() - started,
    }


def serve(case: dict[str, Any]) -> dict[str, Any]:
    """Start an engine for one case, serve its batches, and stop it."""
    started = time.perf_counter()
    llm = LLM(
        case["model"],
        dtype="float32",
        enforce_eager=True,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        additional_config={"kvcompress": case["kvcompress"]},
        **case["engine"],
    )
    recorder = Recorder(llm, bool(case.get("crowd")))
    if case.get("always_shift"):
        recorder.always_shift()
    result: dict[str, Any] = {
        "classes": recorder.classes(),
        "num_blocks": recorder.runner.kv_cache_config.num_blocks,
        "free_blocks": recorder.free_blocks(),
        "start_seconds": time.perf_counter() - started,
    }
    result["runs"] = [run(llm, recorder, case, step) for step in case["runs"]]
    result["totals"] = llm.collective_rpc("kvcompress_totals")[0]
    llm.llm_engine.engine_core.shutdown()
    del llm, recorder
    gc.collect()
    cleanup_dist_env_and_memory()
    return result


def main() -> None:
    """Read the cases, run one after the other and write their results."""
    cases_path, results_path = map(Path, sys.argv[1:])
    plugin.register()
    results = [serve(case) for case in json.loads(cases_path.read_text())]
    results_path.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
