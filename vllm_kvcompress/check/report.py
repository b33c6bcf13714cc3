"""A check as text, JSON and a plot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from vllm_kvcompress.check.findings import Findings
from vllm_kvcompress.check.layers import LAYER_REMOVED
from vllm_kvcompress.check.recommend import Advice
from vllm_kvcompress.check.skip import MAX_GROUPS, OTHERS_KEEP, named, sensitive_layers

WORST = 5
"""Layers that are named with their losses."""


def markdown(findings: Findings, advice: Advice) -> str:
    """The whole check as Markdown."""
    lines = [
        f"# {findings.model}",
        "",
        f"{findings.tokens} tokens of context, {findings.seconds:.0f} s; the first "
        f"{findings.sinks} and last {findings.recent} tokens of each context were always kept"
        f"{_window(findings.recent_ratio)}. "
        f"The full cache recalls {findings.full_right:.0%} of the facts.",
        "",
        "| Method | Rank correlation | " + " | ".join(map(_share, findings.shares)) + " |",
        "|---" * (2 + len(findings.shares)) + "|",
    ]
    for method, skip in findings.ways:
        cells = [_cell(findings, method, share, skip) for share in findings.shares]
        label = f"`{method}`, layers skipped" if skip else f"`{method}`"
        lines.append(f"| {label} | {findings.signal(method):+.2f} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Losses against the full cache: nats per token on running text / nats per token of "
        "recalled facts / share of facts lost.",
        "",
        *_layers(findings),
        *(f"- `{method}`: {verdict}." for method, verdict in advice.verdicts.items()),
        "",
        *advice.words,
        "",
        "Settings:" if advice.use else "If it is on for other reasons, switch it off:",
        "",
        "```",
        f"--additional-config '{json.dumps({'kvcompress': advice.settings})}'",
        "```",
    ]
    return "\n".join(lines) + "\n"


def _window(ratio: float) -> str:
    return (
        f", and of what is kept {ratio:.0%} were last tokens, where that is more" if ratio else ""
    )


def _share(removed: float) -> str:
    return f"{removed:.0%} removed"


def _cell(findings: Findings, method: str, share: float, skip: bool) -> str:
    if share not in findings.measured(skip):
        return "out of reach"
    loss = findings.loss(method, share, skip)
    return f"{loss.text:.3f} / {loss.recall:.2f} / {loss.right:.0%}"


def _layers(findings: Findings) -> list[str]:
    """What layers lose alone and which are skipped, as a paragraph; empty if not measured."""
    losses = findings.layer_loss
    if not losses:
        return []
    worst = sorted(range(len(losses)), key=lambda layer: -losses[layer])[:WORST]
    told = (
        f"Each layer alone with {LAYER_REMOVED:.0%} removed by `{findings.layer_method}`, nats per "
        f"token of recalled facts: median {median(losses):.3f}, the worst are "
        f"{', '.join(f'layer {layer} ({losses[layer]:.3f})' for layer in worst)}. "
    )
    if not findings.skip_layers:
        return [told + _none_skipped(losses), ""]
    skipped = "; ".join(
        f"at {share:.0%} removed {named(layers)}" for share, layers in findings.skip_layers.items()
    )
    told += (
        "Where layers are skipped, some keep every token and the others fewer, so that the mean "
        f"over all layers is the share removed: {skipped}. A share is out of reach where the "
        f"others would keep less than {OTHERS_KEEP:.0%}, or than the first and last tokens."
    )
    return [told, ""]


def _none_skipped(losses: Sequence[float]) -> str:
    sensitive = sorted(sensitive_layers(losses))
    if not sensitive:
        return "No layer loses so much more than the others that it should be skipped."
    words, lose = named(sensitive).capitalize(), "loses" if len(sensitive) == 1 else "lose"
    return (
        f"{words} {lose} far more, but no number of {len(losses)} layers can be skipped at these "
        f"shares without more than {MAX_GROUPS} KV cache groups, or leaving the others less than "
        f"{OTHERS_KEEP:.0%}."
    )


def as_json(findings: Findings, advice: Advice) -> str:
    """All numbers, with the advice."""
    told: dict[str, Any] = {
        "advice": {
            "use": advice.use,
            "settings": advice.settings,
            "words": list(advice.words),
            "verdicts": dict(advice.verdicts),
        },
        **findings.as_dict(),
    }
    return json.dumps(told, indent=1) + "\n"


def plot(findings: Findings, file: Path) -> None:
    """Draw the rank correlation per layer, and per head as dots; last what layers lose alone.

    Parameters
    ----------
    findings : Findings
    file : Path
        Its ending says the format, such as ``.png``.

    Raises
    ------
    ValueError
        matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError(
            "the plot needs matplotlib: pip install matplotlib, or leave --plot out."
        ) from None
    rows = len(findings.methods) + bool(findings.layer_loss)
    figure = Figure(figsize=(9, 2.2 * rows), layout="constrained")
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]
    for axis, method in zip(axes, findings.methods, strict=False):
        heads = findings.correlation[method]
        for layer, own in enumerate(heads):
            axis.scatter([layer] * len(own), own, s=8, color="tab:gray")
        axis.bar(range(len(heads)), findings.by_layer(method), alpha=0.5)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_ylim(-1, 1)
        axis.set_ylabel(method)
    most = max(findings.skip_layers, default=0.0)
    if findings.layer_loss:
        skipped = set(findings.skip_layers.get(most, ()))
        layers = range(len(findings.layer_loss))
        colors = ["tab:red" if layer in skipped else "tab:blue" for layer in layers]
        axes[-1].bar(layers, findings.layer_loss, color=colors)
        axes[-1].axhline(0, color="black", linewidth=0.8)
        axes[-1].set_ylabel(f"{findings.layer_method}:\nnats lost alone")
    red = f" (red: skipped at {most:.0%} removed)" if findings.skip_layers else ""
    axes[-1].set_xlabel(f"layer{red}")
    figure.suptitle(f"{findings.model}: rank correlation of score and attention")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
