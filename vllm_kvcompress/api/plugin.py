"""Entry point ``kvcompress`` of vLLM's endpoint plugins: runs in every API server.

vLLM loads it only where ``VLLM_PLUGINS`` names it; ``serve.py`` sees to that.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI
from starlette.datastructures import State
from vllm.engine.protocol import EngineClient
from vllm.tasks import SupportedTask

from vllm_kvcompress.api import routes
from vllm_kvcompress.api.snapshot import Snapshots
from vllm_kvcompress.config import settings_of
from vllm_kvcompress.scheduler.utility import METHOD


class KVCompressEndpoints:
    """The endpoints ``/v1/kvcompress``, ``/kvcompress`` and more metrics."""

    name = "kvcompress"
    required_tasks: tuple[SupportedTask, ...] | None = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes; vLLM calls this once."""
        routes.attach(app)

    async def init_state(
        self, engine_client: EngineClient | None, state: State, args: Namespace
    ) -> None:
        """Connect the routes to the engines, if these compress at all."""
        if engine_client is None:
            return
        settings = settings_of(engine_client.vllm_config.additional_config)
        if settings is None:
            return
        engines: Any = engine_client.engine_core

        async def fetch(
            closings: Mapping[int, int], wanted: Sequence[str]
        ) -> Sequence[dict[str, Any]]:
            # collective_rpc_async would answer for the first engine only.
            answers: Sequence[dict[str, Any]] = await engines.call_utility_all_async(
                METHOD, dict(closings), list(wanted)
            )
            return answers

        state.kvcompress_settings = settings
        state.kvcompress = Snapshots(fetch, settings.finished_requests)
