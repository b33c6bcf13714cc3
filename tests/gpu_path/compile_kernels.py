"""Compile the kernels of ``worker/gpu`` for NVIDIA GPUs, on a machine that has none."""

from __future__ import annotations

import itertools
from typing import Any

import triton.backends
from sitecustomize import pretend_driver

pretend_driver()  # for vLLM, while it is imported
from vllm_kvcompress.worker.gpu import kernels  # noqa: E402

del triton.backends.backends["cpu"]

from triton import language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

CAPABILITIES = (80, 90)
TYPES: tuple[dict[str, Any], ...] = (
    {"TYPE": tl.bfloat16, "FP8": ""},
    {"TYPE": tl.uint8, "FP8": "e4m3"},
)
SIZES = {"HEADS": 8, "SIZE": 16, "DIM": 128, "TILE": 32, "TILES": 8}
POINTERS = {
    **dict.fromkeys(("addresses", "starts", "blocks", "tokens", "room"), "*i64"),
    **dict.fromkeys(("out", "inverse", "sums", "means"), "*fp32"),
}


def compile_kernel(kernel: Any, capability: int, loaded: dict[str, Any]) -> None:
    """Compile a kernel to machine code for GPUs of a capability."""
    moves = "room" in kernel.arg_names
    known = {**SIZES, **loaded, "WIDE": 128}
    if moves:
        known |= {"TYPE": tl.int64, "WORDS": 32, "WIDE": 32}
    names = kernel.arg_names
    signature = {n: "constexpr" if n in known else POINTERS.get(n, "i32") for n in names}
    constants = {name: known[name] for name in names if name in known}
    source = ASTSource(kernel, signature, constexprs=constants)
    found = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    assert found.asm["cubin"], kernel


def main() -> None:
    """Compile all kernels for all types and capabilities."""
    names = ("squared_norms", "add_unit_keys", "cosines", "gather", "scatter")
    variants = list(itertools.product(names, CAPABILITIES, TYPES))
    for name, capability, loaded in variants:
        compile_kernel(getattr(kernels, name), capability, loaded)
    print(f"{len(variants)} kernels")


if __name__ == "__main__":
    main()
