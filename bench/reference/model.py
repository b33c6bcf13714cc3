"""Loading the model, the same way everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging


def load(directory: Path, dtype: str = "float32") -> tuple[PreTrainedModel, Any]:
    """Model and tokenizer of a directory.

    Parameters
    ----------
    directory : Path
    dtype : str
        Name of a type of torch.
    """
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype))
    return model.eval(), AutoTokenizer.from_pretrained(directory)


def stop_tokens(model: PreTrainedModel) -> frozenset[int]:
    """Tokens that end an answer."""
    found = model.generation_config.eos_token_id
    return frozenset(found if isinstance(found, list) else [] if found is None else [found])
