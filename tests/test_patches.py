"""The diffs in ``patches/`` apply to the installed vLLM and do what they say."""

from __future__ import annotations

import importlib.util
import pickle
import py_compile
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

PATCHES = Path(__file__).parents[1] / "patches"
NAMES = sorted(path.name for path in PATCHES.glob("*.patch"))


def installed() -> Path:
    """The directory that holds ``vllm/``, found without importing it."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parents[1]


def targets(patch: Path) -> list[str]:
    return re.findall(r"(?m)^\+\+\+ b/(\S+)", patch.read_text())


def patched(names: list[str], directory: Path) -> Path:
    """Copy the touched files of the installed release and apply patches to the copies."""
    for name in names:
        for target in targets(PATCHES / name):
            copy = directory / target
            copy.parent.mkdir(parents=True, exist_ok=True)
            if not copy.exists():
                shutil.copyfile(installed() / target, copy)
    for name in names:
        run = subprocess.run(
            ["patch", "-p1", "--fuzz=0", "--forward", "--input", str(PATCHES / name)],
            cwd=directory,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, run.stdout + run.stderr
        assert "offset" not in run.stdout, run.stdout
    return directory


def load(path: Path) -> ModuleType:
    """A patched file as a module of its own, beside the installed one."""
    name = f"patched_{path.stem}_{abs(hash(path))}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickle look it up there
    spec.loader.exec_module(module)
    return module


def test_readme_lists_every_patch() -> None:
    rows = re.findall(r"(?m)^\| `(\S+\.patch)` \| (.+?) \|", (PATCHES / "README.md").read_text())
    assert [name for name, _ in rows] == NAMES
    for name, column in rows:
        assert re.findall(r"`(.+?)`", column) == targets(PATCHES / name)


@pytest.mark.parametrize("name", NAMES)
def test_applies_and_compiles(name: str, tmp_path: Path) -> None:
    patched([name], tmp_path)
    for target in targets(PATCHES / name):
        py_compile.compile(str(tmp_path / target), doraise=True)
        assert (tmp_path / target).read_text() != (installed() / target).read_text()


def test_all_apply_together(tmp_path: Path) -> None:
    patched(NAMES, tmp_path)


def test_config_hook_is_called_once_per_config(tmp_path: Path) -> None:
    patched([NAMES[0]], tmp_path)
    plugins = load(tmp_path / "vllm/plugins/__init__.py")
    seen: list[object] = []
    plugins.register_config_hook(seen.append)
    hook = seen.append
    plugins.register_config_hook(hook)  # a plugin that is loaded a second time
    plugins.apply_config_hooks("config")
    assert seen == ["config"]


def test_scheduler_output_carries_plugin_metadata(tmp_path: Path) -> None:
    patched([NAMES[1]], tmp_path)
    module = load(tmp_path / "vllm/v1/core/sched/output.py")
    output = module.SchedulerOutput.make_empty()
    assert output.plugin_metadata is None
    output.plugin_metadata = {"kvcompress": module.SchedulerPluginMetadata()}
    copy = pickle.loads(pickle.dumps(output))
    assert isinstance(copy.plugin_metadata["kvcompress"], module.SchedulerPluginMetadata)


def test_command_knows_its_version_under_any_distribution_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import vllm.entrypoints.cli.main as unpatched

    version = metadata.version

    def no_such_distribution(name: str) -> str:
        if name == "vllm":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setattr(sys, "argv", ["vllm", "--version"])
    monkeypatch.setattr(metadata, "version", no_such_distribution)
    with pytest.raises(metadata.PackageNotFoundError):
        unpatched.main()
    patched([NAMES[2]], tmp_path)
    with pytest.raises(SystemExit) as stopped:
        load(tmp_path / "vllm/entrypoints/cli/main.py").main()
    assert stopped.value.code == 0
    assert capsys.readouterr().out.strip() == sys.modules["vllm"].__version__
