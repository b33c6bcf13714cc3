"""The model's rotary embedding, learned from the module that applies it."""

from __future__ import annotations

from typing import Any

import torch

from vllm_kvcompress.methods.pooling import Rotation
from vllm_kvcompress.settings import SettingsError

ADVICE = "set pooling=best or max, which turn no keys"


def learn_rotation(model: Any, layer_names: list[str], head_size: int) -> Rotation | None:
    """Angles by which a model turns keys per position.

    Parameters
    ----------
    model : torch.nn.Module
    layer_names : list of str
        Its attention layers.
    head_size : int

    Returns
    -------
    Rotation or None
        ``None`` for a model without rotary embedding.

    Raises
    ------
    SettingsError
        If layers differ, or keys are not turned by a fixed angle per position.
    """
    if not any(_is_rotary(module) for module in model.modules()):
        return None
    config = getattr(model, "config", None)
    if getattr(config, "no_rope_layers", None) or getattr(config, "no_rope_layer_interval", None):
        raise SettingsError(
            f"kvcompress: pooling=mean needs one rotary embedding for all layers; {ADVICE}."
        )
    found: list[Any] = []
    for name in layer_names:
        attention = model.get_submodule(name.rpartition(".")[0])
        own = [module for module in attention.children() if _is_rotary(module)]
        if len(own) != 1:
            raise SettingsError(
                f"kvcompress: pooling=mean found {len(own)} rotary embeddings beside {name}, "
                f"where one is needed; {ADVICE}."
            )
        if own[0] not in found:
            found.append(own[0])
    rotations = [_learn(module, head_size) for module in found]
    first = rotations[0]
    for other in rotations[1:]:
        if other.neox != first.neox or not torch.equal(other.angles, first.angles):
            raise SettingsError(
                f"kvcompress: pooling=mean needs one rotary embedding for all layers; {ADVICE}."
            )
    return first


def _is_rotary(module: Any) -> bool:
    return hasattr(module, "rotary_dim") and hasattr(module, "head_size")


def _learn(module: Any, head_size: int) -> Rotation:
    name = type(module).__name__
    try:
        # The module's own table is rounded to the model's type; this one is not.
        cos, sin = module._compute_cos_sin_cache()[1].double().chunk(2)
    except (AttributeError, TypeError):
        raise SettingsError(f"kvcompress: pooling=mean does not know {name}; {ADVICE}.") from None
    device = next(iter(module.buffers())).device
    angles = torch.atan2(sin, cos).float().to(device)
    rotation = Rotation(angles, bool(module.is_neox_style))
    if 2 * len(angles) != module.rotary_dim or not _explains(rotation, module, head_size):
        raise SettingsError(
            f"kvcompress: {name} does not turn keys by a fixed angle per position, which "
            f"pooling=mean needs; {ADVICE}."
        )
    return rotation


@torch.inference_mode()
def _explains(rotation: Rotation, module: Any, head_size: int) -> bool:
    """Whether turning a key from one position to another gives what the module makes there."""
    device = rotation.angles.device
    dtype = next(iter(module.buffers())).dtype
    last = module.max_position_embeddings - 1
    positions = torch.tensor([1, 2, 9, 64, last], device=device).clamp(max=last)
    generator = torch.Generator().manual_seed(0)
    key = torch.randn(head_size, generator=generator).to(device, dtype)
    keys = key.expand(len(positions), head_size).contiguous()
    _, rotated = module.forward_native(positions, keys.clone(), keys.clone())
    rotated = rotated.float()
    turned = rotation.turn(rotated[:1].expand_as(rotated), (positions - positions[0]).float())
    # Tables of angles are less exact the farther a position is.
    slack = 0.05 if dtype != torch.float32 else 1e-3 + 1e-6 * last
    return bool((turned - rotated).abs().max() <= slack * key.float().abs().max())
