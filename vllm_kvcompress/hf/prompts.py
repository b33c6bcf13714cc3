"""Prompts that fit: instructions stay whole, over-long contexts are cut in their middle."""

from __future__ import annotations

from typing import Any

SEPARATOR = "\n\n"


class PromptError(ValueError):
    """A prompt that does not fit; the message is one sentence for the user."""


def split_prompt(prompt: str, context: str = "") -> tuple[str, str]:
    """Context and instruction: the last paragraph of a prompt is its instruction.

    Parameters
    ----------
    prompt : str
        Paragraphs, with blank lines between them.
    context : str
        Stands before the prompt's own.
    """
    own, _, instruction = prompt.rstrip().rpartition(SEPARATOR)
    return SEPARATOR.join(part for part in (context.strip(), own) if part), instruction


def fit_prompt(tokenizer: Any, context: str, instruction: str, limit: int, cut: bool) -> str:
    """A prompt of at most ``limit`` tokens.

    Beginning and end of a context say most about it, so its middle is cut.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    context, instruction : str
    limit : int
        In tokens, special tokens included.
    cut : bool
        Whether an over-long context is cut; refused otherwise.

    Raises
    ------
    PromptError
        If it does not fit.
    """
    prompt = _join(context, instruction)
    length = _length(tokenizer, prompt)
    if length <= limit:
        return prompt
    if not cut:
        raise PromptError(
            f"The prompt has {length} tokens, but the model takes {limit} beside what it "
            "generates; use --compress_context to cut the context, or shorten it."
        )
    ids = tokenizer(context, add_special_tokens=False)["input_ids"]
    keep = len(ids) - (length - limit)
    while keep > 0:
        head = (keep + 1) // 2
        parts = [ids[:head], ids[len(ids) - (keep - head) :]]
        texts = [tokenizer.decode(part, skip_special_tokens=True) for part in parts]
        prompt = _join("".join(texts), instruction)
        length = _length(tokenizer, prompt)
        if length <= limit:
            return prompt
        keep -= length - limit  # text cut within a word may need a token more
    if (length := _length(tokenizer, instruction)) <= limit:
        return instruction
    raise PromptError(
        f"The instruction alone has {length} tokens, but the model takes {limit} beside what it "
        "generates; it is never cut."
    )


def _join(context: str, instruction: str) -> str:
    return f"{context}{SEPARATOR}{instruction}" if context else instruction


def _length(tokenizer: Any, text: str) -> int:
    return len(tokenizer(text, verbose=False)["input_ids"])
