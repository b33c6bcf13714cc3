"""What every refusal of a setting looks like."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from vllm_kvcompress.settings import SettingsError


def check_one_sentence(error: pytest.ExceptionInfo[SettingsError], named: Sequence[str]) -> str:
    """Check that an error is one sentence that names all of these; return it."""
    message = str(error.value)
    for part in named:
        assert part in message
    assert message.endswith(".")
    assert ". " not in message
    assert "\n" not in message
    assert error.value.__cause__ is None
    return message
