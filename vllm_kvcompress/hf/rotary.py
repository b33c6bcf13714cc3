"""A transformers model's rotary embedding, as far as merging turns keys with it."""

from __future__ import annotations

import sys
from importlib import import_module
from typing import Any

import torch
from transformers import AutoModel

from vllm_kvcompress.methods.pooling import Rotation
from vllm_kvcompress.settings import SettingsError

CHANGING = ("dynamic", "longrope")
"""RoPE types whose angles depend on the length of the sequence."""

_POSITION = 5.0


def rotation_of(model: Any) -> Rotation | None:
    """The rotation that a model's cached keys carry.

    Angles come from the model's own rotary module; which channels pair is tried on its own
    ``apply_rotary_pos_emb``, since models differ and configurations do not say.

    Parameters
    ----------
    model : PreTrainedModel or Module or PreTrainedConfig
        The model, one of its attention modules, or its configuration.

    Returns
    -------
    Rotation or None
        ``None`` for a model without RoPE.

    Raises
    ------
    SettingsError
        Names the kind of RoPE that cannot be used.
    """
    config = getattr(model, "config", model).get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        if getattr(config, "rope_theta", None) or getattr(config, "rotary_dim", None):
            raise _refusal("it does not say its RoPE in rope_parameters")
        return None
    kind = parameters.get("rope_type", "default") if isinstance(parameters, dict) else None
    if kind is None or any(isinstance(value, dict) for value in parameters.values()):
        raise _refusal("its layers have different RoPEs")
    if any(name in kind for name in CHANGING):
        raise _refusal(f"the angles of RoPE type {kind!r} change with the length")
    if not all(getattr(config, "no_rope_layers", None) or [1]):
        raise _refusal("some of its layers have no RoPE (no_rope_layers)")
    if getattr(config, "kv_lora_rank", None):
        raise _refusal("its keys are only partly rotated (MLA)")
    module = _modeling_module(model, config)
    embeddings = [
        value
        for name, value in vars(module).items()
        if isinstance(value, type) and name.endswith("RotaryEmbedding")
    ]
    apply = getattr(module, "apply_rotary_pos_emb", None)
    if len(embeddings) != 1 or apply is None:
        raise _refusal("its code has no single rotary embedding")
    embedding = embeddings[0](config)
    for neox in (True, False):
        rotation = Rotation(embedding.inv_freq.detach().float().cpu(), neox)
        if _agrees(rotation, embedding, apply):
            return rotation
    raise _refusal("its rotary embedding pairs channels in an unknown way")


def _modeling_module(model: Any, config: Any) -> Any:
    """The module of the model's code, from whichever of the two is at hand."""
    if isinstance(model, torch.nn.Module):
        return sys.modules[type(model).__module__]
    try:
        return import_module(AutoModel._model_mapping[type(config)].__module__)
    except KeyError:
        raise _refusal(f"{type(config).__name__} is not known; pass the model itself") from None


def _agrees(rotation: Rotation, embedding: Any, apply: Any) -> bool:
    """Whether turning a key is what the model does between positions 0 and 5."""
    channels = 2 * rotation.angles.shape[0]
    keys = torch.randn(1, 1, 1, channels, generator=torch.Generator().manual_seed(0))
    try:
        at = [
            apply(keys, keys, *embedding(keys, torch.tensor([[position]])))[1]
            for position in (0, int(_POSITION))
        ]
    except (TypeError, ValueError, RuntimeError, IndexError):
        return False  # signatures of another kind of RoPE
    if at[0].shape != keys.shape:
        return False
    return torch.allclose(rotation.turn(at[0], _POSITION), at[1], atol=1e-4)


def _refusal(reason: str) -> SettingsError:
    return SettingsError(
        f"kvcompress: pooling=mean is not supported for this model: {reason}; "
        "use pooling=best, max or an eviction method."
    )
