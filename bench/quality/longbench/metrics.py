"""LongBench's metrics, from kept libraries where they exist.

Same as LongBench: QA F1, classification, retrieval, count, and code similarity where its
``fuzzywuzzy`` runs with ``python-Levenshtein`` (with difflib it gives other numbers).
Different:

* ROUGE-L is rouge-score's ``rougeLsum`` over sentences, where LongBench has the package
  ``rouge``. That one is case-sensitive, leaves punctuation on the words and counts a word that
  is repeated once, so its numbers differ by some points, in both directions.
* In classification LongBench removes class names from a list while it walks through it, and so
  may leave one in that is part of the right name; here all such are removed.

Chinese sets need a word segmenter (jieba) that is not installed here, and are refused.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

Metric = Callable[[str, str, Sequence[str]], float]
"""Prediction, one right answer and the names of all classes, to a score from 0 to 1."""


def normalized(text: str) -> str:
    """Lower case without punctuation, articles and surplus space, as SQuAD has it."""
    text = "".join(char for char in text.lower() if char not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def qa_f1(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of the words, as often as they stand, after `normalized`."""
    said, wanted = normalized(prediction).split(), normalized(answer).split()
    same = sum((Counter(said) & Counter(wanted)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(said), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


def rouge_l(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """F1 of ROUGE-L over sentences (the longest common subsequences' union)."""
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeLsum"])
    lines = [re.sub(r"(?<=[.!?])\s+", "\n", text) for text in (answer, prediction)]
    return float(scorer.score(*lines)["rougeLsum"].fmeasure)


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """1 over the number of class names that the prediction has, if the right one is among them.

    Names that are part of the right one do not count.
    """
    found = [name for name in classes if name in prediction]
    found = [name for name in found if name == answer or name not in answer]
    return 1 / len(found) if answer in found else 0.0


def count(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Share of the numbers in the prediction that are the right one."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(str(answer)) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """`count` for the number in an answer like ``Paragraph 7``."""
    return count(prediction, re.findall(r"Paragraph (\d+)", answer)[0])


def code_similarity(prediction: str, answer: str, classes: Sequence[str] = ()) -> float:
    """Edit similarity of the first line that is no comment and no fence, in whole percent."""
    from rapidfuzz import fuzz

    lines = prediction.lstrip("\n").split("\n")
    code = [line for line in lines if not any(mark in line for mark in ("`", "#", "//"))]
    return round(fuzz.ratio(code[0] if code else "", answer)) / 100


METRICS: dict[str, Metric] = {
    **dict.fromkeys(
        (
            *("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique"),
            "triviaqa",
        ),
        qa_f1,
    ),
    **dict.fromkeys(("gov_report", "qmsum", "multi_news", "samsum"), rouge_l),
    "trec": classification,
    "passage_retrieval_en": retrieval,
    "passage_count": count,
    **dict.fromkeys(("lcc", "repobench-p"), code_similarity),
}
"""Metric of each English set."""

CHINESE = ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")

FIRST_LINE = frozenset(("trec", "triviaqa", "samsum", "lsht"))
"""Sets of which only the first line of a prediction is scored: the few-shot ones."""


def score(dataset: str, prediction: str, answers: Sequence[str], classes: Sequence[str]) -> float:
    """Best score against any of the answers.

    Parameters
    ----------
    dataset : str
        Name of the set, with or without LongBench-E's ``_e``.
    prediction : str
    answers : sequence of str
    classes : sequence of str
        All class names, for classification.

    Returns
    -------
    float
        From 0 to 1.
    """
    name = dataset.removesuffix("_e")
    if name in FIRST_LINE:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return max((METRICS[name](prediction, answer, classes) for answer in answers), default=0.0)
