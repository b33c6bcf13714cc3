"""Our methods against kvpress's, which ran in an environment of its own (docs/reference.md)."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from bench.quality.plan import SHORT
from bench.quality.rows import read_rows
from bench.reference.__main__ import failing_tasks
from bench.reference.cases import case_lines, scored, unscored
from bench.reference.files import open_at_end, read_lines, write_lines
from bench.reference.shares import kept_tokens
from vllm_kvcompress.hf import CompressedCache, l2_compress
from vllm_kvcompress.limits import Limits
from vllm_kvcompress.methods import METHODS, ScoreContext, select_tokens

ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).parent / "fixtures" / "reference"
REFERENCE_PYTHON = ROOT / ".venv-reference" / "bin" / "python"
SHARES = (0.25, 0.5, 0.75, 0.9)
OURS = {"KnormPress": "knorm", "KeyDiffPress": "keydiff"}

every_press = pytest.mark.parametrize("press", OURS)
every_share = pytest.mark.parametrize("share", SHARES)


def fixture(name: str) -> dict[str, np.ndarray]:
    with np.load(FIXTURES / name) as arrays:
        return dict(arrays)


# The other environment's side of the evaluation.


@pytest.mark.parametrize("block_size", [1, 16, 32])
@pytest.mark.parametrize("removed", SHARES)
def test_kvpress_is_told_to_keep_what_our_server_keeps(removed, block_size):
    limits = Limits(None, 1 - Fraction(str(removed)), sinks=4, recent=64, block_size=block_size)
    for tokens in (*range(1200, 1300), 1500, 7500):
        old, kept = limits.blocks_kept(tokens, tokens)
        ours = tokens - (old - min(kept, old)) * block_size
        assert kept_tokens(tokens, removed, block_size) == ours


class Words:
    """A tokenizer that knows words only."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [hash(word) % 1000 for word in text.split()]


def test_cases_come_in_turn_and_answers_are_scored(tmp_path):
    plan = replace(SHORT, count=2, language_count=2, lengths={"": (100,)})
    lines = list(case_lines(plan, ["passkey", "niah_single_1"], Words()))
    assert [line["task"] for line in lines] == ["passkey", "niah_single_1"] * 2
    assert lines[0]["protocols"] == ["strict", "after_prompt"]
    assert lines[1]["protocols"] == ["strict"]

    path = tmp_path / "cases.jsonl"
    write_lines(path, lines)
    with path.open("a") as file:
        file.write('{"cut off')
    assert read_lines(path) == json.loads(json.dumps(lines))
    with open_at_end(path) as file:
        file.write("{}\n")
    assert read_lines(path)[-1] == {} and len(read_lines(path)) == 5

    same = {name: lines[0][name] for name in ("task", "key", "prompt", "tokens", "depth")}
    same |= {"model": "m", "implementation": "kvpress", "method": "KnormPress"}
    same |= {"removed": 0.5, "protocol": "strict", "kept": 0.5}
    right = scored({**same, "prediction": f" {lines[0]['answers'][0]}."}, lines[0])
    wrong = scored({**same, "prediction": " 1."}, lines[0])
    assert (right.score, wrong.score) == (1.0, 0.0)
    (tmp_path / "rows.jsonl").write_text(right.line() + "\n")
    assert list(read_rows([tmp_path / "rows.jsonl"])) == [right]
    assert scored(unscored(json.loads(right.line())), lines[0]) == right
    assert failing_tasks([replace(wrong, method="full", score=0.1), right]) == {"passkey"}
    assert failing_tasks([replace(wrong, method="full"), replace(right, method="full")]) == set()
    with pytest.raises(ValueError, match="another prompt"):
        scored({**same, "prompt": "0", "prediction": ""}, lines[0])


def test_the_other_environment_needs_nothing_of_ours():
    for path in (ROOT / "bench" / "reference").glob("*.py"):
        if path.name not in ("cases.py", "__main__.py"):
            imported = re.findall(r"^\s*(?:from|import) ([\w.]+)", path.read_text(), re.MULTILINE)
            ours = [name for name in imported if re.match(r"vllm|bench(?!\.reference)", name)]
            assert not ours, path


# The same tokens.


@pytest.fixture(scope="module")
def random_case():
    return fixture("random.npz")


def marks(bits: np.ndarray, tokens: int) -> torch.Tensor:
    return torch.from_numpy(np.unpackbits(bits, axis=-1, count=tokens).astype(bool))


def exact_scores(press: str, keys: torch.Tensor) -> torch.Tensor:
    """By definition and in float64, ``[..., tokens]``; the highest are kept."""
    keys = keys.double()
    if press == "KnormPress":
        return -keys.norm(dim=-1)
    unit = keys / keys.norm(dim=-1, keepdim=True)
    mean = unit.mean(dim=-2, keepdim=True)
    return -(unit * (mean / mean.norm(dim=-1, keepdim=True))).sum(-1)


def slack(press: str, scores: torch.Tensor) -> torch.Tensor:
    """How near two scores may be for our rounding to tie them.

    Squared norms are rounded to 12 bits, so that those within 2**-12 of one another may tie:
    norms within 2**-13. Cosines are rounded to 1/4096. And a hundredth for float32 noise.
    """
    if press == "KnormPress":
        return 1.01 * 2.0**-13 * scores.abs().amax(-1)
    return torch.full(scores.shape[:-1], 1.01 / 4096)


def our_marks(press: str, keys: torch.Tensor, keep: int) -> torch.Tensor:
    """Which tokens our method keeps, without sinks; like the keys without the last axis."""
    heads, tokens, _ = keys.shape
    context = ScoreContext(layer=0, position=tokens, total_heads=heads)
    chosen = select_tokens(METHODS[OURS[press]]().score(keys, context), keep, sinks=0)
    return torch.zeros(heads, tokens, dtype=torch.bool).scatter(-1, chosen, True)


def assert_same_sets(press, keys, theirs) -> int:
    """The same tokens, up to those that our rounding ties; returns how many of these differ."""
    keep = int(theirs[0].sum())
    assert (theirs.sum(-1) == keep).all()
    ours = our_marks(press, keys, keep)
    scores = exact_scores(press, keys)
    for head in (ours != theirs).any(-1).nonzero()[:, 0]:
        differ = scores[head, ours[head] != theirs[head]]
        assert differ.max() - differ.min() <= slack(press, differ)
    return int((ours & ~theirs).sum())


@every_press
@every_share
def test_random_keys_same_sets(random_case, press, share):
    keys = torch.from_numpy(random_case["keys"])
    tokens = keys.shape[1]
    theirs = marks(random_case[f"{press}-{share}"], tokens)
    assert int(theirs[0].sum()) == tokens - int(share * tokens)
    # Scores of random keys are seldom so near.
    assert assert_same_sets(press, keys, theirs) <= 1


@every_press
def test_random_keys_scores_have_the_same_order(random_case, press):
    keys = torch.from_numpy(random_case["keys"])
    theirs = torch.from_numpy(random_case[f"{press}-scores"]).double()
    torch.testing.assert_close(theirs, exact_scores(press, keys), rtol=1e-5, atol=1e-6)
    context = ScoreContext(layer=0, position=keys.shape[1], total_heads=len(keys))
    ours = METHODS[OURS[press]]().score(keys, context)
    for head in range(len(keys)):
        order = theirs[head].argsort()
        mine, sorted_scores = ours[head][order], theirs[head][order]
        assert (mine.diff() >= 0).all()
        apart = sorted_scores.diff() > slack(press, sorted_scores)
        assert (mine.diff()[apart] > 0).all()
        assert apart.sum() > 0.5 * len(apart)


def test_another_rule_would_be_seen(random_case):
    keys = torch.from_numpy(random_case["keys"])
    theirs = marks(random_case["KnormPress-0.5"], keys.shape[1])
    with pytest.raises(AssertionError):
        assert_same_sets("KeyDiffPress", keys, theirs)
    with pytest.raises(AssertionError):
        assert_same_sets("KnormPress", -keys.flip(1), theirs)


@pytest.fixture(scope="module")
def model(smollm):
    return AutoModelForCausalLM.from_pretrained(smollm, dtype=torch.float32)


@pytest.fixture(scope="module")
def model_case():
    return fixture("model.npz")


@pytest.fixture(scope="module")
def model_keys(model, model_case):
    cache = DynamicCache()
    with torch.no_grad():
        model.model(torch.from_numpy(model_case["token_ids"]).long()[None], past_key_values=cache)
    return [layer.keys[0] for layer in cache.layers]


@every_press
@every_share
def test_model_same_sets(model_case, model_keys, press, share):
    tokens = len(model_case["token_ids"])
    theirs = marks(model_case[f"{press}-{share}"], tokens)
    assert theirs.shape == (len(model_keys), len(model_keys[0]), tokens)
    swapped = [
        assert_same_sets(press, keys, layer) for keys, layer in zip(model_keys, theirs, strict=True)
    ]
    # Layer 0 ties whole words: rotation leaves the norm of a token's key as it was.
    assert sum(swapped[1:]) <= 0.01 * theirs[1:].sum()


@pytest.mark.slow
@every_press
@every_share
def test_same_answers(model, smollm, press, share):
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    for case in json.loads((FIXTURES / "answers.json").read_text()):
        context, question = case["context_ids"], case["question_ids"]
        kept = len(context) - int(share * len(context))
        ratio = (kept - 0.5) / len(context)
        cache = DynamicCache()
        if press == "KeyDiffPress":
            cache = CompressedCache(
                {"method": "keydiff", "keep_ratio": ratio, "sink_tokens": 0, "recent_tokens": 0}
            )
        with torch.no_grad():
            model.model(torch.tensor([context]), past_key_values=cache)
            if press == "KnormPress":
                cache = l2_compress(cache, keep_ratio=ratio, prune_after=0)
            answer, tokens = [], question
            for _ in range(8):
                logits = model(torch.tensor([tokens]), past_key_values=cache).logits
                tokens = [int(logits[0, -1].argmax())]
                answer += tokens
        assert cache.layers[0].keys.shape[2] == kept + len(question) + 7
        assert (
            tokenizer.decode(answer, skip_special_tokens=True)
            == (case["answers"][f"{press}-{share}"])
        )


@pytest.mark.slow
@pytest.mark.skipif(not REFERENCE_PYTHON.exists(), reason="needs the environment of make reference")
def test_one_prefill_for_all_presses_is_exact(smollm):
    command = [REFERENCE_PYTHON, "-m", "bench.reference.check", "--model", smollm]
    subprocess.run(command, cwd=ROOT, check=True, timeout=600)
