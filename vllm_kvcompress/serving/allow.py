"""Letting vLLM load our HTTP endpoints without keeping anything else from loading.

vLLM loads endpoint plugins only if ``VLLM_PLUGINS`` names them, and then loads nothing, of any
kind, that it does not name.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping
from importlib.metadata import entry_points

VARIABLE = "VLLM_PLUGINS"
NAME = "kvcompress"
ENDPOINTS = "vllm.endpoint_plugins"

OTHERS = (
    "vllm.general_plugins",
    "vllm.io_processor_plugins",
    "vllm.platform_plugins",
    "vllm.stat_logger_plugins",
)
"""The other groups that ``VLLM_PLUGINS`` decides about."""

OPT_IN = frozenset({"lora_hf_hub_resolver"})
"""General plugins of vLLM that take being named for permission to download."""


def allow_endpoints(environment: MutableMapping[str, str] = os.environ) -> str | None:
    """Name in ``VLLM_PLUGINS`` all that vLLM loads without it, and our endpoints.

    A user's own ``VLLM_PLUGINS`` stays as it is.

    Parameters
    ----------
    environment : mutable mapping
        Changed in place.

    Returns
    -------
    str or None
        Why there will be no endpoints, ``None`` if there will.
    """
    if VARIABLE in environment:
        if NAME in environment[VARIABLE].split(","):
            return None
        return f"{VARIABLE} does not name {NAME}"
    endpoints = {point.name for point in entry_points(group=ENDPOINTS)}
    if NAME not in endpoints:
        return "the installed package has no entry point for it; install it anew"
    names = {point.name for group in OTHERS for point in entry_points(group=group)} - OPT_IN
    if both := sorted(names & endpoints - {NAME}):
        # Named as plugins of another kind, they would open their endpoints too.
        return (
            f"to name {NAME} in {VARIABLE} means to name {', '.join(both)} too, which adds "
            f"endpoints of others; set {VARIABLE} yourself"
        )
    environment[VARIABLE] = ",".join(sorted(names | {NAME}))
    return None
