"""A check as text, JSON and a plot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from vllm_kvcompress.check.findings import Findings
from vllm_kvcompress.check.recommend import Advice


def markdown(findings: Findings, advice: Advice) -> str:
    """The whole check as Markdown."""
    lines = [
        f"# {findings.model}",
        "",
        f"{findings.tokens} tokens of context, {findings.seconds:.0f} s; the first "
        f"{findings.sinks} and last {findings.recent} tokens of each context were always kept. "
        f"The full cache recalls {findings.full_right:.0%} of the facts.",
        "",
        "| Method | Rank correlation | " + " | ".join(map(_share, findings.shares)) + " |",
        "|---" * (2 + len(findings.shares)) + "|",
    ]
    for method in findings.methods:
        cells = [_cell(findings, method, share) for share in findings.shares]
        lines.append(f"| `{method}` | {findings.signal(method):+.2f} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Losses against the full cache: nats per token on running text / nats per token of "
        "recalled facts / share of facts lost.",
        "",
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


def _share(removed: float) -> str:
    return f"{removed:.0%} removed"


def _cell(findings: Findings, method: str, share: float) -> str:
    loss = findings.loss(method, share)
    return f"{loss.text:.3f} / {loss.recall:.2f} / {loss.right:.0%}"


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
    """Draw the rank correlation per layer, and per head as dots.

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
    figure = Figure(figsize=(9, 2.2 * len(findings.methods)), layout="constrained")
    axes = figure.subplots(len(findings.methods), 1, sharex=True, squeeze=False)[:, 0]
    for axis, method in zip(axes, findings.methods, strict=True):
        heads = findings.correlation[method]
        for layer, own in enumerate(heads):
            axis.scatter([layer] * len(own), own, s=8, color="tab:gray")
        axis.bar(range(len(heads)), findings.by_layer(method), alpha=0.5)
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_ylim(-1, 1)
        axis.set_ylabel(method)
    axes[-1].set_xlabel("layer")
    figure.suptitle(f"{findings.model}: rank correlation of score and attention")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
