"""Compiled kernels are kept as long as no source of theirs changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_kvcompress.worker.cpu.stale import forget_stale_kernels


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("kernel", "helper"):
        (tmp_path / f"{name}.py").write_text(f"# {name}")
    forget_stale_kernels(tmp_path)
    for name in ("kernel.f-1.py311.nbi", "kernel.f-1.py311.1.nbc", "kernel.cpython-311.pyc"):
        (tmp_path / "__pycache__" / name).touch()
    return tmp_path


def kept(folder: Path) -> set[str]:
    return {path.suffix for path in (folder / "__pycache__").iterdir()} - {".sha256"}


def test_kernels_are_kept(folder: Path) -> None:
    forget_stale_kernels(folder)
    assert kept(folder) == {".nbi", ".nbc", ".pyc"}


@pytest.mark.parametrize("change", ["edit", "add", "rename"])
def test_a_changed_helper(folder: Path, change: str) -> None:
    helper = folder / "helper.py"
    if change == "edit":
        helper.write_text("# other")
    elif change == "add":
        (folder / "another.py").touch()
    else:
        helper.rename(folder / "renamed.py")
    forget_stale_kernels(folder)
    assert kept(folder) == {".pyc"}
    (folder / "__pycache__" / "kernel.f-1.py311.nbi").touch()
    forget_stale_kernels(folder)
    assert kept(folder) == {".nbi", ".pyc"}
