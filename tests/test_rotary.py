"""Learning a model's rotary embedding from its modules, and refusing those that do not fit."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import get_rope

from vllm_kvcompress.settings import SettingsError
from vllm_kvcompress.worker.rotary import learn_rotation

NAMES = ["layers.0.attention.attn", "layers.1.attention.attn"]
HEAD = 16
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}


def rope(neox: bool = True, dtype: torch.dtype = torch.float32, **parameters: Any) -> Any:
    with set_current_vllm_config(VllmConfig()):
        return get_rope(
            HEAD,
            256,
            is_neox_style=neox,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0, **parameters},
            dtype=dtype,
        )


def model(*ropes: Any, **config: Any) -> torch.nn.Module:
    """A model whose attention layers own these rotary embeddings."""
    result = torch.nn.Module()
    result.layers = torch.nn.ModuleList()
    for embedding in ropes:
        layer, attention = torch.nn.Module(), torch.nn.Module()
        if embedding is not None:
            attention.rotary_emb = embedding
        attention.attn = torch.nn.Identity()
        layer.attention = attention
        result.layers.append(layer)
    result.config = SimpleNamespace(**config)
    return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize(
    "parameters",
    [{}, {"partial_rotary_factor": 0.5}, LLAMA3, YARN, {"rope_type": "linear", "factor": 2.0}],
    ids=lambda p: p.get("rope_type", "partial" if p else "default"),
)
def test_learns(parameters: dict[str, Any], neox: bool, dtype: torch.dtype) -> None:
    embedding = rope(neox, dtype, **parameters)
    rotation = learn_rotation(model(embedding, embedding), NAMES, HEAD)
    assert rotation is not None
    assert rotation.neox is neox
    assert rotation.angles.dtype == torch.float32
    # Far from the float32 grid of the module's own table: exact in the frequency itself.
    cos, _ = embedding._compute_cos_sin_cache()[3].chunk(2)
    scale = embedding._compute_cos_sin_cache()[0][0]
    assert torch.allclose(torch.cos(3 * rotation.angles), cos / scale, atol=1e-6)


def test_model_without_rotary_embedding() -> None:
    assert learn_rotation(model(None, None), NAMES, HEAD) is None


class Wandering(torch.nn.Module):
    """Turns keys by an angle that grows with the square of the position."""

    head_size, rotary_dim, is_neox_style, max_position_embeddings = HEAD, HEAD, True, 256

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cos_sin_cache", self._compute_cos_sin_cache())

    def _compute_cos_sin_cache(self) -> torch.Tensor:
        angles = torch.arange(256.0)[:, None] ** 2 * torch.linspace(0.1, 0.001, HEAD // 2)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward_native(self, positions: torch.Tensor, query: torch.Tensor, key: Any) -> Any:
        cos, sin = self.cos_sin_cache[positions].chunk(2, dim=-1)
        first, second = key.chunk(2, dim=-1)
        return query, torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


class Unknown(torch.nn.Module):
    rotary_dim = head_size = HEAD


@pytest.mark.parametrize(
    ("built", "said"),
    [
        (lambda: model(rope(), None), "found 0 rotary embeddings beside layers.1"),
        (lambda: model(rope(), rope(rope_theta=500.0)), "one rotary embedding for all layers"),
        (lambda: model(rope(), rope(), no_rope_layers=[1, 0]), "for all layers"),
        (lambda: model(Wandering(), Wandering()), "Wandering does not turn keys by a fixed angle"),
        (lambda: model(Unknown(), Unknown()), "does not know Unknown"),
    ],
)
def test_refuses_by_name(built: Any, said: str) -> None:
    with pytest.raises(SettingsError) as raised:
        learn_rotation(built(), NAMES, HEAD)
    assert said in str(raised.value)
    assert "pooling=best or max" in str(raised.value)
