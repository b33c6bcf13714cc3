"""``serve.py``: its options, and the ``vllm serve`` command line they become."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from vllm_kvcompress import bundled, cli
from vllm_kvcompress.api.plugin import KVCompressEndpoints
from vllm_kvcompress.serving import allow, announce, main, options
from vllm_kvcompress.serving import command as commands
from vllm_kvcompress.settings import Settings, SettingsError, parse_settings


@pytest.fixture(autouse=True)
def process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the machine's own settings, and ``sys.argv`` restored afterwards."""
    monkeypatch.setattr(sys, "argv", ["serve.py"])
    for variable in ("VLLM_PLUGINS", "VLLM_API_KEY"):
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A stand-in for the converted bundled model: its configuration only."""
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}
    directory = model(tmp_path / "bundled", **heads)
    monkeypatch.setattr(bundled, "model_directory", lambda: Path(directory))
    return directory


def model(directory: Path, layers: int = 30, **config: Any) -> str:
    from transformers import LlamaConfig

    LlamaConfig(num_hidden_layers=layers, **config).save_pretrained(directory)
    return str(directory)


def command(*argv: str) -> commands.Command:
    raw, rest = options.split_arguments(argv)
    return commands.build_command(raw, rest, commands.inspect_arguments(rest))


def vllm_reads(argv: list[str]) -> argparse.Namespace:
    """What ``vllm serve`` itself makes of a command line."""
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = FlexibleArgumentParser()
    ServeSubcommand().subparser_init(parser.add_subparsers(dest="subparser"))
    return parser.parse_args(argv)


# Options and settings


@pytest.mark.parametrize(
    ("option", "value", "setting"),
    [
        ("method", "keydiff", "keydiff"),
        ("budget", "512", 512),
        ("keep-ratio", "0.25", 0.25),
        ("keep-ratio", "1", 1.0),
        ("prune-after", "1000", 1000),
        ("sink-tokens", "8", 8),
        ("recent-tokens", "32", 32),
        ("skip-layers", "0,1", (0, 1)),
        ("skip-layers", "", ()),
        ("skip-heads", "8:0,7:2", ((7, 2), (8, 0))),
        ("skip-heads", "", ()),
        ("pyramid-beta", "4", 4.0),
        ("bands", "6", 6),
        ("interval", "64", 64),
        ("phase", "during_prefill", "during_prefill"),
        ("seed", "7", 7),
    ],
)
def test_option_becomes_setting(option: str, value: str, setting: object) -> None:
    name = option.replace("-", "_")
    for argv in (
        [f"--kvcompress-{option}", value],
        [f"--kvcompress-{option}={value}"],
        [f"--kvcompress_{name}={value}"],
    ):
        raw, rest = options.split_arguments(argv)
        assert rest == []
        assert getattr(parse_settings(raw), name) == setting


def test_every_setting_has_an_option() -> None:
    parser = argparse.ArgumentParser()
    options.add_options(parser)
    flags = {flag for action in parser._actions for flag in action.option_strings}
    for name in Settings.model_fields:
        assert "--kvcompress-" + name.replace("_", "-") in flags
    assert parser.parse_args([]) == argparse.Namespace()  # no defaults of its own


def test_setting_types_with_and_without_a_command_line_form() -> None:
    assert options._converter(bool)("true") is True
    assert options._converter(bool | None)("False") is False
    assert options._converter(int | None)("many") == "many"
    with pytest.raises(TypeError):
        options._converter(dict[str, int])


def test_other_arguments_are_kept_in_order() -> None:
    raw, rest = options.split_arguments(
        ["model", "--port", "9", "--kvcompress-budget", "512", "-tp", "2", "--x.y", "-1"]
    )
    assert raw == {"budget": 512}
    assert rest == ["model", "--port", "9", "-tp", "2", "--x.y", "-1"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--kvcompress-budget", "abc"], ["budget='abc'", "integer"]),
        (["--kvcompress-budget", "-5"], ["budget=-5"]),
        (["--kvcompress-budget"], ["--kvcompress-budget", "expected one argument"]),
        (["--kvcompress-method", "bogus"], ["method='bogus'", "knorm", "none"]),
        (["--kvcompress-phase", "later"], ["phase='later'", "after_prefill"]),
        (["--kvcompress-keep-ratio", "2"], ["keep_ratio=2.0"]),
        (["--kvcompress-skip-layers", "0,x"], ["skip_layers", "'x'", "integer"]),
        (["--kvcompress-budgte", "1"], ["--kvcompress-budgte", "--kvcompress-budget"]),
        (["--kvcompress-bud", "512"], ["--kvcompress-bud;"]),
        (["--kvcompress-budget", "512", "--kvcompress-keep-ratio", "0.5"], ["512", "0.5"]),
        (["--additional-config", "[1]"], ["--additional-config", "JSON object"]),
        (["--additional-config", '{"kvcompress": 3}'], ["int"]),
        (["--kvcompress-skip-layers", "30"], ["skip_layers", "0 to 29"]),
        (["--kvcompress-skip-heads", "8:0,7"], ["skip_heads", "'7'", "LAYER:HEAD"]),
        (["--kvcompress-skip-heads", "29:2,29:3"], ["skip_heads", "29:3", "heads 0 to 2"]),
        (["--kvcompress-budget", "32"], ["budget=32"]),
    ],
)
def test_bad_settings_end_with_one_sentence(
    demo: str, argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main.main(argv) == 2
    output = capsys.readouterr()
    assert output.out == ""
    sentence = output.err.strip()
    assert "\n" not in sentence
    assert sentence.endswith(".")
    for word in words:
        assert word in sentence


def test_option_unknown_to_vllm_ends_too(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main.main(["--no-such-option", "3"])
    assert stopped.value.code == 2
    assert "--no-such-option" in capsys.readouterr().err


def test_help_shows_both(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main.main(["--help"])
    assert stopped.value.code == 0
    output = capsys.readouterr().out
    assert "--kvcompress-budget" in output
    assert "CacheConfig" in output


# The command for vLLM


def test_settings_travel_in_additional_config() -> None:
    built = command("m", "--kvcompress-budget", "512", "--port", "9000")
    values = vllm_reads(built.argv)
    assert built.argv[:4] == ["serve", "m", "--port", "9000"]
    assert values.additional_config == {"kvcompress": {"budget": 512}}
    assert (values.model_tag, values.port) == ("m", 9000)


def test_compression_is_on_without_any_option() -> None:
    assert vllm_reads(command("m").argv).additional_config == {"kvcompress": {}}


@pytest.mark.parametrize(
    "given",
    [
        ["--additional-config", '{"a": {"b": [1]}, "kvcompress": {"budget": 64, "bands": 1}}'],
        ['--additional_config={"a": {"b": [1]}, "kvcompress": {"budget": 64, "bands": 1}}'],
        [
            "--additional-config.a.b+",
            "1",
            '--additional_config.kvcompress={"budget": 64, "bands": 1}',
        ],
    ],
)
def test_additional_config_is_merged_and_options_win(given: list[str]) -> None:
    built = command("m", *given, "--seed", "3", "--kvcompress-budget", "512")
    values = vllm_reads(built.argv)
    assert values.additional_config["kvcompress"] == {"budget": 512, "bands": 1}
    assert list(map(int, values.additional_config["a"]["b"])) == [1]
    assert values.seed == 3
    assert built.settings.bands == 1


def test_additional_config_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("model: m\nport: 9000\nadditional-config:\n  a: 1\n")
    built = command("--config", str(file), "--kvcompress-budget", "512")
    values = vllm_reads(built.argv)
    assert built.model == values.model == "m"
    assert values.additional_config == {"a": 1, "kvcompress": {"budget": 512}}
    assert values.port == 9000


def test_method_none_is_stock_vllm() -> None:
    arguments = ["m", "--port", "9000", "--additional-config", '{"a": 1}']
    assert command("--kvcompress-method", "none", *arguments).argv == ["serve", *arguments]
    config = '{"a": 1, "kvcompress": {"budget": 512}}'
    built = command("m", "--additional-config", config, "--kvcompress-method", "none")
    assert vllm_reads(built.argv).additional_config == {"a": 1}


def test_no_model_means_the_bundled_one(demo: str) -> None:
    values = vllm_reads(command("--kvcompress-budget", "512").argv)
    assert values.model_tag == demo
    assert (values.host, values.port) == ("127.0.0.1", 8000)
    assert values.served_model_name == ["SmolLM2-135M-Instruct"]
    assert values.block_size == 32
    assert values.kv_cache_memory_bytes == 512 * 2**20


def test_defaults_of_the_demo_give_way(demo: str, tmp_path: Path) -> None:
    file = tmp_path / "serve.yaml"
    file.write_text("kv-cache-memory-bytes: 1g\n")
    argv = ["--host", "0.0.0.0", "--block_size=64", "--served-model-name", "a", "b"]
    argv += ["--no-enforce-eager", "--config", str(file)]
    values = vllm_reads(command(*argv).argv)
    assert values.model_tag == demo
    assert (values.host, values.block_size) == ("0.0.0.0", 64)
    assert values.served_model_name == ["a", "b"]
    assert values.kv_cache_memory_bytes == 10**9
    assert not values.enforce_eager


def test_share_of_memory_replaces_the_default_amount(demo: str) -> None:
    values = vllm_reads(command("--gpu-memory-utilization", "0.5").argv)
    assert values.kv_cache_memory_bytes is None


def test_a_named_model_gets_no_demo_defaults() -> None:
    stock, ours = vllm_reads(["serve", "m"]), vllm_reads(command("m").argv)
    ours.additional_config = stock.additional_config
    assert vars(ours) == vars(stock)


def test_hands_over_to_the_vllm_command(demo: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[str]] = []
    monkeypatch.setattr(main, "require_plugin", lambda: None)
    monkeypatch.setattr(main, "allow_endpoints", lambda: None)
    monkeypatch.setattr(cli, "main", lambda: seen.append(sys.argv) or 0)
    assert main.main(["--kvcompress-budget", "512"]) == 0
    assert seen[0][:3] == ["vllm", "serve", demo]


# Where accounts are shown


def points(**groups: str) -> Any:
    """Stands for ``entry_points``: names by kind of plugin, separated by spaces."""

    def entry_points(group: str) -> list[SimpleNamespace]:
        kind = group.removeprefix("vllm.").removesuffix("_plugins")
        return [SimpleNamespace(name=name) for name in groups.get(kind, "").split()]

    return entry_points


@pytest.mark.parametrize(
    ("installed", "named"),
    [
        (points(general="kvcompress", endpoint="kvcompress"), "kvcompress"),
        (
            points(
                general="kvcompress lora_filesystem_resolver lora_hf_hub_resolver mine",
                platform="board",
                stat_logger="log",
                io_processor="io",
                endpoint="kvcompress other",
            ),
            # Neither the endpoints of others nor downloads are allowed by us.
            "board,io,kvcompress,log,lora_filesystem_resolver,mine",
        ),
    ],
)
def test_endpoints_are_allowed_and_nothing_is_kept_out(
    installed: Any, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(allow, "entry_points", installed)
    environment: dict[str, str] = {}
    assert allow.allow_endpoints(environment) is None
    assert environment == {"VLLM_PLUGINS": named}


@pytest.mark.parametrize(
    ("installed", "given", "problem"),
    [
        (points(general="kvcompress"), {}, "install it anew"),
        (points(general="kvcompress a", endpoint="kvcompress a"), {}, "name a too"),
        (points(endpoint="kvcompress"), {"VLLM_PLUGINS": "a"}, "does not name kvcompress"),
        (points(endpoint="kvcompress"), {"VLLM_PLUGINS": "a,kvcompress"}, None),
    ],
)
def test_endpoints_that_are_not_allowed(
    installed: Any, given: dict[str, str], problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the user or others decided stays as it is."""
    monkeypatch.setattr(allow, "entry_points", installed)
    environment = dict(given)
    found = allow.allow_endpoints(environment)
    assert environment == given
    assert (found is None) if problem is None else problem in found


def test_our_endpoints_are_an_entry_point() -> None:
    (point,) = [p for p in allow.entry_points(group=allow.ENDPOINTS) if p.name == "kvcompress"]
    assert point.load() is KVCompressEndpoints


def test_announcement_of_the_dashboard(demo: str) -> None:
    one = command("--port", "9000")
    assert "http://127.0.0.1:9000/kvcompress" in announce.announce_accounts(one, None)
    assert "no dashboard and no /v1/kvcompress: why." in announce.announce_accounts(one, "why")
    assert announce.announce_accounts(command("m", "--headless"), None) == ""


# A plugin that vLLM does not load would mean no compression, silently


def test_missing_entry_point_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(main, "entry_points", lambda **_: ())
    with pytest.raises(SettingsError, match="not installed"):
        main.require_plugin()


@pytest.mark.parametrize(
    ("allowed", "refused"), [(None, False), ("kvcompress,other", False), ("other", True)]
)
def test_plugin_left_out_by_vllm_is_refused(
    allowed: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "entry_points", lambda **_: ("plugin",))
    if allowed is not None:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    if not refused:
        main.require_plugin()
        return
    with pytest.raises(SettingsError, match="VLLM_PLUGINS"):
        main.require_plugin()


# What is printed


def test_announcement_of_the_demo(demo: str) -> None:
    text = announce.announcement(command("--kvcompress-budget", "512", "--port", "9000"))
    assert "http://127.0.0.1:9000" in text
    body = json.loads(text.split("-d '")[1].split("'")[0])
    assert body["model"] == "SmolLM2-135M-Instruct"
    assert "/v1/chat/completions" in text
    for word in (
        "kvdiff",
        "512",
        "KV heads 7:2,8:0,",
        "24:0: every token",
        "2,048",
        "4,096",
        "8,192",
    ):
        assert word in text


@pytest.mark.parametrize(
    ("options", "skipped"),
    [
        ([], ()),
        (["--tensor-parallel-size", "3"], (7, 18, 23)),
        (["--kvcompress-skip-layers="], ()),
        (["--kvcompress-skip-layers=0,1"], (0, 1)),
        (["--kvcompress-bands", "6"], ()),
        (["--kvcompress-pyramid-beta", "2"], ()),
        (["--additional-config", '{"kvcompress": {"skip_layers": [3]}}'], (3,)),
    ],
)
def test_layers_that_the_demo_keeps_whole(
    demo: str, options: list[str], skipped: tuple[int, ...]
) -> None:
    """Heads, where they can change places; nothing that the user has not asked for else."""
    found = command(*options)
    assert found.settings.skip_layers == skipped
    assert len(found.settings.skip_heads) == (0 if options else 15)
    assert found.settings.recent_ratio == (0 if options else 0.5)
    config = found.values.additional_config["kvcompress"]
    assert tuple(config.get("skip_layers", ())) == skipped


def test_recent_share_of_the_demo_may_be_chosen(demo: str) -> None:
    found = command("--kvcompress-recent-ratio", "0.25").settings
    assert (len(found.skip_heads), found.recent_ratio) == (15, 0.25)


def test_layers_of_a_named_model_are_not_skipped(tmp_path: Path) -> None:
    settings = command(model(tmp_path / "named")).settings
    assert settings.skip_layers == settings.skip_heads == settings.boost_heads == ()


def test_announcement_of_stock_vllm(demo: str) -> None:
    text = announce.announcement(command("--kvcompress-method", "none"))
    assert "Compression is off" in text


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "curl http://127.0.0.1:8000/v1/completions"),
        (["--host", "0.0.0.0"], "curl http://127.0.0.1:8000/v1"),
        (["--host", "::1", "--port", "9000"], "http://[::1]:9000/v1"),
        (["--ssl-certfile", "cert.pem"], "https://127.0.0.1:8000"),
        (["--uds", "/tmp/a socket"], "--unix-socket '/tmp/a socket'"),
        (["--api-key", "secret"], "Bearer $VLLM_API_KEY"),
        (["--served-model-name", "short", "long"], '"model": "short"'),
    ],
)
def test_example_request(argv: list[str], expected: str) -> None:
    text = announce.announcement(command("m", *argv))
    assert expected in text
    assert "secret" not in text


def test_layer_count_only_where_it_is_certain(tmp_path: Path) -> None:
    from transformers import MistralConfig

    plain = model(tmp_path / "plain", layers=12, num_key_value_heads=8)
    assert announce.uniform_layers(plain) == (12, 8)
    assert announce.uniform_layers(str(tmp_path / "nowhere")) is None
    MistralConfig(sliding_window=64).save_pretrained(tmp_path / "sliding")
    assert announce.uniform_layers(str(tmp_path / "sliding")) is None
