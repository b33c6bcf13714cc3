"""Tiny models with signal or a retrieving layer planted, and made-up findings, for the check."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from vllm_kvcompress.check.findings import Findings, Loss
from vllm_kvcompress.check.recommend import MAX_RECALL, MAX_RIGHT, MAX_TEXT

VOCABULARY = 128


def encode(text: str) -> list[int]:
    """A token per character."""
    return [ord(char) % VOCABULARY for char in text]


def tiny_model(layers: int = 3, **more: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=4096,
        **more,
    )
    return LlamaForCausalLM(config).eval()


def planted_model(sign: float) -> LlamaForCausalLM:
    """Attention falls (``sign=1``) or rises with the norm of a key, and with nothing else.

    All queries are one vector; keys are multiples of it, by a number that the token's
    embedding holds. Both live in the channels that hardly turn with the position.
    """
    model = tiny_model(attention_bias=True, rope_theta=1e9)
    slow = torch.tensor([3, 7])  # the slowest pair of eight channels
    numbers = torch.linspace(0.05, 0.95, VOCABULARY)
    with torch.no_grad():
        embedding = torch.zeros(VOCABULARY, 32)
        embedding[:, 0], embedding[:, 1] = numbers, (1 - numbers**2).sqrt()
        model.model.embed_tokens.weight.copy_(embedding)
        for layer in model.model.layers:
            attention = layer.self_attn
            for name, parameter in attention.named_parameters():
                if not name.startswith("v_proj.weight"):
                    parameter.zero_()
            for head in range(4):
                attention.q_proj.bias[8 * head + slow] = sign
            for head in range(2):
                attention.k_proj.weight[8 * head + slow, 0] = -1.0
            layer.mlp.down_proj.weight.zero_()
    return model


MARK, ANSWER, QUESTION = 1, 2, 3  # tokens


def retrieving_model(layers: int, retrieving: int) -> LlamaForCausalLM:
    """One layer alone looks for the mark, if the question or answer asks it to, and answers.

    The mark's key has the highest norm, so that ``knorm`` drops it first. All other keys are
    zero, and all other layers add nothing.
    """
    model = tiny_model(layers, attention_bias=True, rope_theta=1e9)
    slow = torch.tensor([3, 7])
    with torch.no_grad():
        embedding = torch.zeros(VOCABULARY, 32)
        embedding[:, 0] = 1
        embedding[MARK], embedding[[ANSWER, QUESTION]] = torch.eye(32)[1], torch.eye(32)[3]
        model.model.embed_tokens.weight.copy_(embedding)
        for layer in model.model.layers:
            for parameter in layer.self_attn.parameters():
                parameter.zero_()
            layer.mlp.down_proj.weight.zero_()
        attention = model.model.layers[retrieving].self_attn
        for head in range(4):
            attention.q_proj.weight[8 * head + slow, 3] = 2.0
        for head in range(2):
            attention.k_proj.weight[8 * head + slow, 1] = 2.0
            attention.v_proj.weight[8 * head, 1] = 1.0
        attention.o_proj.weight[2, ::8] = 1.0
        model.lm_head.weight.zero_()
        model.lm_head.weight[ANSWER, 2] = 2.0
    return model


def losses_at(
    shares: Sequence[float], losses: Mapping[str, Sequence[float]], skip: bool = False
) -> list[Loss]:
    """Losses in units of what is acceptable, at the first of some shares."""
    return [
        Loss(name, share, part * MAX_TEXT, part * MAX_RECALL, part * MAX_RIGHT, skip)
        for name, own in losses.items()
        for share, part in zip(shares, own, strict=False)
    ]


def findings(losses: dict[str, list[float]], signal: dict[str, float]) -> Findings:
    """Losses at 25, 50 and 75 % removed in units of what is acceptable."""
    return Findings(
        model="made-up",
        tokens=1000,
        correlation={name: [[signal[name]] * 2] * 3 for name in losses},
        losses=losses_at((0.25, 0.5, 0.75), losses),
        full_right=0.9,
        seconds=1.0,
        sinks=4,
        recent=64,
    )
