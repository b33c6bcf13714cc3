"""Settings: what is accepted, and one sentence for everything that is not."""

from __future__ import annotations

from typing import Any

import pytest
from refusal import check_one_sentence

from vllm_kvcompress.methods import METHODS
from vllm_kvcompress.settings import DEFAULT_BUDGET, Settings, SettingsError, parse_settings

REFUSED: list[tuple[Any, list[str]]] = [
    # What was passed, and what the message must name: key, value, what is allowed.
    ({"metod": "knorm"}, ["'metod'", "'knorm'", "allowed are method, budget"]),
    ({"method": "h2o"}, ["method='h2o'", *METHODS, "none"]),
    ({"method": 3}, ["method=3", "string"]),
    ({"budget": 0}, ["budget=0", "greater than or equal to 1"]),
    ({"budget": "512"}, ["budget='512'", "valid integer"]),
    ({"budget": 512.0}, ["budget=512.0", "valid integer"]),
    ({"budget": True}, ["budget=True", "valid integer"]),
    ({"max_budget": 0}, ["max_budget=0", "greater than or equal to 1"]),
    ({"max_budget": "all"}, ["max_budget='all'", "valid integer"]),
    ({"budget": 512, "max_budget": 511}, ["max_budget (511)", "less than budget (512)"]),
    ({"max_budget": 512}, ["max_budget (512)", f"less than budget ({DEFAULT_BUDGET})"]),
    ({"finished_requests": -1}, ["finished_requests=-1", "greater than or equal to 0"]),
    ({"finished_requests": 10**6}, ["finished_requests=1000000", "less than or equal to 100000"]),
    ({"keep_ratio": 0.0}, ["keep_ratio=0.0", "greater than 0"]),
    ({"keep_ratio": 1.5}, ["keep_ratio=1.5", "less than or equal to 1"]),
    ({"keep_ratio": float("nan")}, ["keep_ratio=nan", "less than or equal to 1"]),
    ({"keep_ratio": "half"}, ["keep_ratio='half'", "valid number"]),
    ({"prune_after": -1}, ["prune_after=-1", "greater than or equal to 0"]),
    ({"sink_tokens": -4}, ["sink_tokens=-4", "greater than or equal to 0"]),
    ({"recent_tokens": -64}, ["recent_tokens=-64", "greater than or equal to 0"]),
    ({"recent_tokens": None}, ["recent_tokens=None", "valid integer"]),
    ({"recent_ratio": -0.5}, ["recent_ratio=-0.5", "greater than or equal to 0"]),
    ({"recent_ratio": 1.5}, ["recent_ratio=1.5", "less than or equal to 1"]),
    ({"skip_layers": "0,1"}, ["skip_layers='0,1'", "valid tuple"]),
    ({"skip_layers": [0, "last"]}, ["skip_layers.1='last'", "valid integer"]),
    ({"skip_layers": [-1]}, ["skip_layers=[-1]", "count from 0"]),
    ({"skip_layers": [2, 0, 2]}, ["skip_layers=[2, 0, 2]", "named twice"]),
    ({"skip_heads": "7:2,8"}, ["skip_heads='7:2,8'", "LAYER:HEAD", "'8'"]),
    ({"skip_heads": "7:2,-1:0"}, ["skip_heads=", "LAYER:HEAD", "'-1:0'"]),
    ({"skip_heads": [[7, -2]]}, ["skip_heads=[[7, -2]]", "count from 0"]),
    ({"skip_heads": [[7, 2, 0]]}, ["skip_heads", "Tuple should have at most 2 items"]),
    ({"skip_heads": [7]}, ["skip_heads.0=7", "valid tuple"]),
    ({"skip_heads": 7}, ["skip_heads=7", "valid tuple"]),
    ({"skip_heads": "7:2,8:0,7:2"}, ["skip_heads='7:2,8:0,7:2'", "named twice"]),
    ({"boost_heads": "7:2,8"}, ["boost_heads='7:2,8'", "LAYER:HEAD", "'8'"]),
    ({"boost_heads": "7:2,7:2"}, ["boost_heads='7:2,7:2'", "named twice"]),
    ({"boost_heads": "7:2", "boost": 0.5}, ["boost=0.5", "greater than or equal to 1"]),
    ({"boost_heads": "7:2", "boost": float("inf")}, ["boost=inf", "finite"]),
    ({"pyramid_beta": 0.0}, ["pyramid_beta=0.0", "greater than 0"]),
    ({"pyramid_beta": float("inf")}, ["pyramid_beta=inf", "finite"]),
    ({"bands": 0}, ["bands=0", "greater than or equal to 1"]),
    ({"interval": 0}, ["interval=0", "greater than or equal to 1"]),
    ({"phase": "prefill"}, ["phase='prefill'", "'after_prefill', 'during_prefill' or 'decode'"]),
    ({"seed": -1}, ["seed=-1", "greater than or equal to 0"]),
    ({"seed": 1 << 40}, [f"seed={1 << 40}", "less than or equal to"]),
    ({"budget": 10**20}, [f"budget={10**20}", "less than or equal to 1000000000"]),
    ({"budget": 9, "keep_ratio": 0.5}, ["budget (9)", "keep_ratio (0.5)", "set one of them"]),
    ({"phase": "decode", "keep_ratio": 0.5}, ["keep_ratio (0.5)", "phase=decode", "set budget"]),
    ({"pooling": "mean"}, ["pooling (mean)", "method=kvdiff", "merge or knorm+merge"]),
    ({"method": "merge", "pooling": "sum"}, ["pooling='sum'", "'mean', 'max' or 'best'"]),
    ({"merge_weighting": "none"}, ["merge_weighting (none)", "method=kvdiff merges nothing"]),
    ({"method": "merge", "merge_weighting": 2}, ["merge_weighting=2", "'count' or 'none'"]),
    ("knorm", ["additional_config['kvcompress']", "object of settings", "str"]),
    (None, ["additional_config['kvcompress']", "object of settings", "NoneType"]),
]


@pytest.mark.parametrize(("raw", "named"), REFUSED, ids=[str(raw) for raw, _ in REFUSED])
def test_refuses_in_one_sentence(raw: Any, named: list[str]) -> None:
    with pytest.raises(SettingsError) as error:
        parse_settings(raw)
    check_one_sentence(error, named)


@pytest.mark.parametrize("key", Settings.model_fields)
def test_every_setting_is_refused_somewhere(key: str) -> None:
    assert any(isinstance(raw, dict) and key in raw for raw, _ in REFUSED)


def test_defaults() -> None:
    settings = parse_settings({})
    assert settings.enabled
    assert settings.method == "kvdiff"
    assert settings.token_budget == DEFAULT_BUDGET
    assert settings.phase == "after_prefill"


@pytest.mark.parametrize(
    ("raw", "budget"),
    [({}, DEFAULT_BUDGET), ({"budget": 96}, 96), ({"keep_ratio": 0.25}, None)],
)
def test_token_budget(raw: dict[str, Any], budget: int | None) -> None:
    assert parse_settings(raw).token_budget == budget


@pytest.mark.parametrize(
    ("raw", "largest"),
    [
        ({}, None),
        ({"max_budget": 4096}, 4096),
        ({"keep_ratio": 0.5, "max_budget": 64}, 64),
        ({"phase": "during_prefill"}, DEFAULT_BUDGET),
        ({"phase": "during_prefill", "budget": 64, "max_budget": 96}, 96),
        ({"phase": "during_prefill", "keep_ratio": 0.5}, None),
    ],
)
def test_largest_budget_of_a_request(raw: dict[str, Any], largest: int | None) -> None:
    assert parse_settings(raw).largest_budget == largest


@pytest.mark.parametrize("method", [*METHODS, "none"])
def test_methods(method: str) -> None:
    assert parse_settings({"method": method}).enabled == (method != "none")


def test_values_of_json_are_taken() -> None:
    settings = parse_settings({"skip_layers": [3, 0], "keep_ratio": 1, "pyramid_beta": 2})
    assert settings.skip_layers == (0, 3)
    assert settings.keep_ratio == 1
    assert settings.pyramid_beta == 2


def test_parsed_settings_pass_through_and_cannot_change() -> None:
    settings = parse_settings({"budget": 64})
    assert parse_settings(settings) is settings
    with pytest.raises(ValueError, match="frozen"):
        settings.budget = 128


def test_every_field_has_a_description() -> None:
    for name, field in Settings.model_fields.items():
        assert field.description, name


@pytest.mark.parametrize("given", ["8:0, 7:2", ["8:0", "7:2"], [[8, 0], [7, 2]], ((8, 0), (7, 2))])
def test_heads_by_name_or_number(given: Any) -> None:
    assert parse_settings({"skip_heads": given}).skip_heads == ((7, 2), (8, 0))
