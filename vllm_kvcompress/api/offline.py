"""Accounts without a server."""

from __future__ import annotations

from typing import Any

from vllm import LLM
from vllm.v1.engine.core_client import InprocClient

from vllm_kvcompress.config import settings_of
from vllm_kvcompress.scheduler.utility import METHOD, kvcompress_snapshot
from vllm_kvcompress.settings import SettingsError


def snapshot(llm: LLM) -> dict[str, Any]:
    """What the engine of an ``LLM`` holds and has held, also while it is idle.

    Parameters
    ----------
    llm : LLM
        With one engine: with data parallelism, that of this process.

    Returns
    -------
    dict
        Among others ``live`` and ``closed``, accounts of requests as the JSON endpoint shows
        them, ``pool`` and ``totals``.

    Raises
    ------
    SettingsError
        If the engine does not compress.
    """
    engine = llm.llm_engine
    if settings_of(engine.vllm_config.additional_config) is None:
        raise SettingsError("kvcompress: this engine runs without compression.")
    client: Any = engine.engine_core
    if isinstance(client, InprocClient):
        return kvcompress_snapshot(client.engine_core)
    found: dict[str, Any] = client.call_utility(METHOD)
    return found
