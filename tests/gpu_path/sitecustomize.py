"""Run vLLM's GPU code path on a CPU, under Triton's interpreter.

Python imports this by itself at start-up where the folder is on ``PYTHONPATH``. It acts by
environment variables, which :func:`gpu_path.harness.run_case` sets:

``TRITON_INTERPRET=1``
    Triton kernels run in numpy; vLLM then accepts Triton on a CPU build.
``VLLM_USE_V2_MODEL_RUNNER=1``
    Model Runner V2, the default on GPUs (vLLM's own variable).
``KVCOMPRESS_TEST_ASYNC=1``
    Asynchronous scheduling, which vLLM's CPU platform turns off.
``KVCOMPRESS_TEST_TRITON_ATTENTION=1``
    vLLM's Triton attention backend, and with it the GPU cache layout (LBNHC).
``KVCOMPRESS_TEST_TRITON_PAGES=1``
    Pages scored and moved by our Triton kernels, which otherwise only GPUs have.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def after_import(module_name: str, action: Callable[[ModuleType], None]) -> None:
    """Call ``action(module)`` once, right after the module has been executed."""

    class Finder(importlib.abc.MetaPathFinder):
        def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
            if name != module_name:
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(name)
            assert spec is not None and spec.loader is not None
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                action(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
            return spec

    sys.meta_path.insert(0, Finder())


def keep_async(module: Any) -> None:
    """Turn asynchronous scheduling back on after the CPU platform's check."""
    check = module.CpuPlatform.check_and_update_config.__func__

    def check_and_update_config(cls: Any, vllm_config: Any) -> None:
        check(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    module.CpuPlatform.check_and_update_config = classmethod(check_and_update_config)


def use_triton_attention(module: Any) -> None:
    """Register the Triton backend under the name that the CPU platform chooses."""
    module.register_backend(
        module.AttentionBackendEnum.CPU_ATTN,
        "vllm.v1.attention.backends.triton_attn.TritonAttentionBackend",
    )


def use_triton_pages(module: Any) -> None:
    """Choose our Triton kernels on this CPU too."""

    def band_pages(layers: Any) -> Any:
        from vllm_kvcompress.worker.gpu.band import TritonBandPages

        assert TritonBandPages.fits(layers)
        return TritonBandPages(layers)

    module.band_pages = band_pages


def pretend_driver() -> None:
    """Give Triton an active driver: without one vLLM takes it for missing."""
    import triton.backends

    class Driver:
        @staticmethod
        def is_active() -> bool:
            return True

    class Backend:
        compiler = None
        driver = Driver

    triton.backends.backends.setdefault("cpu", Backend)


if os.environ.get("TRITON_INTERPRET") == "1":
    pretend_driver()
    if os.environ.get("KVCOMPRESS_TEST_ASYNC") == "1":
        after_import("vllm.platforms.cpu", keep_async)
    if os.environ.get("KVCOMPRESS_TEST_TRITON_ATTENTION") == "1":
        import torch

        torch.cuda.get_device_capability = lambda *args, **kwargs: (9, 0)
        after_import("vllm.v1.attention.backends.registry", use_triton_attention)
    if os.environ.get("KVCOMPRESS_TEST_TRITON_PAGES") == "1":
        after_import("vllm_kvcompress.worker.setup", use_triton_pages)
