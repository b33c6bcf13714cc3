"""Compiled kernels that are older than what they were made from."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path


def forget_stale_kernels(folder: Path) -> None:
    """Remove compiled kernels that numba kept of other sources than there are now.

    numba looks at the file of a kernel only, and would go on using code with old helpers in it
    when another file has changed. (An installation that cannot be written to is replaced as a
    whole, which numba does notice.)

    Parameters
    ----------
    folder : Path
        Where the kernels' sources are.
    """
    digest = sha256()
    for source in sorted(folder.glob("*.py")):
        digest.update(source.name.encode() + source.read_bytes())
    kept = folder / "__pycache__"
    stamp = kept / "kernels.sha256"
    try:
        if stamp.exists() and stamp.read_text() == digest.hexdigest():
            return
        kept.mkdir(exist_ok=True)
        for file in kept.glob("*.nb[ic]"):
            file.unlink(missing_ok=True)
        stamp.write_text(digest.hexdigest())
    except OSError:
        return
