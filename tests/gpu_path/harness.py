"""Cases for :mod:`gpu_path.run_case`, run in subprocesses, and their comparison.

A case is a JSON object:

``model``, ``kvcompress``, ``engine``
    Checkpoint directory, our settings, and arguments of ``vllm.LLM``.
``prompts``
    Token ids of every request.
``sampling``, ``per_request``
    Arguments of ``SamplingParams``, for all requests and by request index.
``runs``
    Batches served one after the other by the same engine: ``{"requests": [0, 1]}``, with
    ``"abort": {"1": 5}`` to abort request 1 after five tokens.
``always_shift``
    Take the branch of GPUs in the attention groups, with their persistent buffers.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
REPOSITORY = HERE.parent.parent

MAX_LOGPROB_DIFFERENCE = 1e-3

Result = dict[str, Any]
"""What ``run_case.py`` writes."""


@dataclass(frozen=True)
class Route:
    """A way through vLLM: runner, scheduler, attention backend, and what moves pages."""

    v2: bool = False
    asynchronous: bool = False
    triton_attention: bool = False
    triton_pages: bool = False

    def environment(self) -> dict[str, str]:
        """Environment of the subprocess."""
        env = dict(os.environ)
        env.update(
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_USE_V2_MODEL_RUNNER=str(int(self.v2)),
            VLLM_LOGGING_LEVEL="WARNING",
            OMP_NUM_THREADS="1",
            HF_HUB_OFFLINE="1",
            KVCOMPRESS_TEST_ASYNC=str(int(self.asynchronous)),
            KVCOMPRESS_TEST_TRITON_ATTENTION=str(int(self.triton_attention)),
            KVCOMPRESS_TEST_TRITON_PAGES=str(int(self.triton_pages)),
        )
        paths = [str(REPOSITORY), *filter(None, [env.get("PYTHONPATH")])]
        if self.v2:
            env["TRITON_INTERPRET"] = "1"
            paths.insert(0, str(HERE))
        env["PYTHONPATH"] = os.pathsep.join(paths)
        return env

    def check(self, classes: dict[str, Any]) -> None:
        """Assert that the engine really took this route, with our classes."""
        runner = "vllm.v1.worker.gpu.model_runner" if self.v2 else "vllm.v1.worker.gpu_model_runner"
        assert runner in classes["runner"]
        assert "vllm_kvcompress.worker.runner" in classes["runner"]
        assert ("AsyncScheduler" in classes["scheduler"]) == self.asynchronous
        assert "KVCompressSchedulerMixin" in classes["scheduler"]
        assert classes["async"] == self.asynchronous
        assert classes["attention"] == ["TRITON_ATTN" if self.triton_attention else "CPU_ATTN"]
        assert classes["layout"] == ("LBNHC" if self.triton_attention else "LBHNC")
        _, head_step, token_step, _ = classes["page_strides"]
        assert (token_step > head_step) == self.triton_attention
        assert classes["compressed_groups"] == classes["groups"]
        assert (classes["pages"] == ["TritonBandPages, working"]) == self.triton_pages


V1 = Route()
V2_SYNC = Route(v2=True)
V2_ASYNC = Route(v2=True, asynchronous=True)
V2_TRITON = Route(v2=True, asynchronous=True, triton_attention=True)
V2_TRITON_PAGES = Route(v2=True, asynchronous=True, triton_attention=True, triton_pages=True)


def run_cases(route: Route, cases: list[dict[str, Any]]) -> list[Result]:
    """Run cases one after the other in a subprocess; check that they took the route.

    Raises
    ------
    AssertionError
        With the end of its output, if the subprocess fails.
    """
    cases = [{"always_shift": route.v2, **case} for case in cases]
    with tempfile.TemporaryDirectory() as folder:
        cases_path, results_path = Path(folder, "cases.json"), Path(folder, "results.json")
        cases_path.write_text(json.dumps(cases))
        done = subprocess.run(
            [sys.executable, str(HERE / "run_case.py"), str(cases_path), str(results_path)],
            env=route.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-6000:]
        results = json.loads(results_path.read_text())
    for result in results:
        route.check(result["classes"])
        for step in result["runs"]:
            assert step["free_blocks"] == result["free_blocks"], "a batch left blocks behind"
    return results


def lives_of(step: dict[str, Any], request: int) -> list[list[dict[str, Any]]]:
    """Plans of one request in a batch, in order, one list for every time it started anew."""
    lives: list[list[dict[str, Any]]] = []
    for plan in step["plans"]:
        if plan["request"] != f"r{request}":
            continue
        if not lives or any(
            plan["position"] < earlier["position"]
            or (plan["position"], plan["group"]) == (earlier["position"], earlier["group"])
            for earlier in lives[-1]
        ):
            lives.append([])
        lives[-1].append(plan)
    return lives


def plans_of(step: dict[str, Any], request: int) -> list[dict[str, Any]]:
    """Plans of one request in the order in which they ran, of its last life if preempted."""
    lives = lives_of(step, request)
    return lives[-1] if lives else []


def compare(found: dict[str, Any], wanted: dict[str, Any], requests: list[int]) -> float:
    """Assert that requests went the same way in two batches.

    Parameters
    ----------
    found, wanted : dict
        Entries of ``runs``, from the same engine or another one.
    requests : list of int
        Requests to compare: plans, kept tokens, decoded tokens and log-probabilities.

    Returns
    -------
    float
        Largest difference of a log-probability.
    """
    worst = 0.0
    for index in requests:
        mine, other = found["requests"][str(index)], wanted["requests"][str(index)]
        for plan, expected in zip(plans_of(found, index), plans_of(wanted, index), strict=True):
            for key in ("group", "position", "sources", "destinations", "holes"):
                assert plan[key] == expected[key], (index, plan, expected)
            for layer, kept in expected["kept"].items():
                assert plan["kept"][layer] == kept, (index, plan["position"], layer)
        assert mine["tokens"] == other["tokens"], index
        for key in ("logprobs", "top"):
            worst = max(worst, _distance(mine[key], other[key]))
    assert worst <= MAX_LOGPROB_DIFFERENCE
    return worst


def _distance(left: Any, right: Any) -> float:
    if isinstance(left, list):
        return max((_distance(a, b) for a, b in zip(left, right, strict=True)), default=0.0)
    return abs(left - right)
