"""Slices: what quantization took from each kind of task, answer by answer against the float model's.

    score      1 or 0: the item's check of the answer (lilliput.suites); of a harness's task 0 to 1, by its own metrics
               (lilliput.suites.harness). Items with a JSON schema also count to "{slice}, parses": whether the answer
               holds a JSON value at all
    drop       float score - score, the mean over the slice's items, with a 95 % interval for paired proportions: Wald's
               after half an item is added to each of the four outcomes (Agresti and Min 2005). A bootstrap would have
               no width where no answer changed, however few were asked
    mean_kld   nats a token along the float model's own answers: it tells where scores of a weak model do not

Expected calibration error (Naeini et al. 2015), over the items with choices: the mean of |accuracy - confidence| in
BINS bins of confidence, each weighed by its items; confidence is the likeliest choice's share among the choices.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from lilliput.grid import Float
from lilliput.results import Example, Interval, SliceFigures, SuiteFigures
from lilliput.suites import Item, harness
from lilliput.suites.harness import HarnessItem
from targets.answers import Answer

BINS = 10
NORMAL_95 = 1.959964  # of the normal distribution, both sides
CIRCLE_TOKENS, CIRCLES = 16, 4  # a run of at most so many tokens, so many times in a row, is a circle
EXAMPLES = 2  # of answers that lost, a slice

Decode = Callable[[Sequence[int]], str]
Asked = Item | HarnessItem


def figures(items: Sequence[Asked], wanted: Sequence[Answer], found: Sequence[Answer], decode: Decode) -> SuiteFigures:
    """Every slice in the order of its first item: the float model's answers `wanted`, a candidate's `found`."""
    slices: dict[str, list[tuple[int, float, float]]] = {}
    both = zip(all_scores(items, wanted, decode), all_scores(items, found, decode), strict=True)
    for i, (before, after) in enumerate(both):
        for name, score in before.items():
            slices.setdefault(name, []).append((i, score, after[name]))
    return SuiteFigures(
        slices=tuple(_slice(name, its, items, wanted, found, decode) for name, its in slices.items()),
        float_calibration_error=calibration_error(items, wanted),
        calibration_error=calibration_error(items, found),
    )


def all_scores(items: Sequence[Asked], answers: Sequence[Answer], decode: Decode) -> list[dict[str, float]]:
    """What each answer counts to which slice."""
    theirs = [(item, answer) for item, answer in zip(items, answers, strict=True) if isinstance(item, HarnessItem)]
    judged = iter(harness.scores([item for item, _ in theirs], [_responses(*pair, decode) for pair in theirs]))
    return [
        next(judged) if isinstance(item, HarnessItem) else scores(item, answer, decode)
        for item, answer in zip(items, answers, strict=True)
    ]


def _responses(item: HarnessItem, answer: Answer, decode: Decode) -> list[harness.Response]:
    """To each of the item's requests."""
    if item.choices:
        return list(zip(answer.choice_log_probabilities, answer.choice_greedy, strict=True))
    return [harness.cut(decode(answer.tokens), item.until)]


def _slice(
    name: str, its: list[tuple[int, float, float]], items: Sequence[Asked], wanted: Sequence[Answer],
    found: Sequence[Answer], decode: Decode,
) -> SliceFigures:  # fmt: skip
    drops = np.array([before - after for _, before, after in its])
    kld = np.array([found[i].mean_kld for i, _, _ in its], dtype=np.float64)
    weights = np.array([wanted[i].rows for i, _, _ in its])
    lost = [i for i, before, after in its if after < before][:EXAMPLES]
    return SliceFigures(
        name=name,
        items=len(its),
        float_score=float(np.mean([before for _, before, _ in its])),
        score=float(np.mean([after for _, _, after in its])),
        drop=float(drops.mean()),
        drop_interval=paired_interval(drops),
        mean_kld=float((kld * weights).sum() / weights.sum()),
        answer_tokens=int(weights.sum()),
        chance=float(np.mean([1 / len(c) if len(c := items[i].choices) > 1 else 0.0 for i, _, _ in its])),
        lost=tuple(
            Example(id=items[i].id, prompt=items[i].prompt, float_answer=said(items[i], wanted[i], decode),
                    answer=said(items[i], found[i], decode))
            for i in lost
        ),
    )  # fmt: skip


def paired_interval(drops: Sequence[float] | Float) -> Interval:
    """95 % interval of the mean of drops from -1 to 1; a drop between counts by its square to the variance."""
    n, change, moved = len(drops) + 2, float(np.sum(drops)), float(np.sum(np.square(drops))) + 1
    half = NORMAL_95 * math.sqrt(moved - change**2 / n) / n
    return Interval(low=max(-1.0, change / n - half), high=min(1.0, change / n + half))


def scores(item: Item, answer: Answer, decode: Decode) -> dict[str, float]:
    """What an answer counts to each slice."""
    text = decode(answer.tokens).strip()
    if item.json_schema is not None:
        values = list(json_values(text))[:1]
        return {item.slice: float(any(map(_valid(item), values))), f"{item.slice}, parses": float(bool(values))}
    if item.label is not None:
        return {item.slice: float(said(item, answer, decode) == item.label)}
    if item.regex is not None:
        return {item.slice: float(re.search(item.regex, text) is not None)}
    if item.expected is not None:
        return {item.slice: float(" ".join(item.expected.split()).casefold() in " ".join(text.split()).casefold())}
    return {item.slice: float(answer.finished and not in_circles(answer.tokens))}


def said(item: Asked, answer: Answer, decode: Decode) -> str:
    """The answer's text, or its likeliest choice."""
    if answer.choice_log_probabilities:
        return item.choices[int(np.argmax(answer.choice_log_probabilities))]
    text = decode(answer.tokens)
    return (harness.cut(text, item.until) if isinstance(item, HarnessItem) else text).strip()


def json_values(text: str) -> Iterator[object]:
    """The first JSON object or array in the text, if there is one; what stands around it does not matter."""
    decoder = json.JSONDecoder()
    for match in re.finditer(r"[\[{]", text):
        try:
            value, _ = decoder.raw_decode(text, match.start())
        except json.JSONDecodeError:
            continue
        yield value
        return


def _valid(item: Item) -> Callable[[object], bool]:
    from jsonschema import Draft202012Validator

    assert item.json_schema is not None
    checked = Draft202012Validator(item.json_schema).is_valid
    return lambda value: bool(checked(value))


def in_circles(tokens: Sequence[int]) -> bool:
    """Whether the last tokens are one run of at most CIRCLE_TOKENS, CIRCLES times over."""
    tail = list(tokens)
    for period in range(1, CIRCLE_TOKENS + 1):
        last = tail[-period * CIRCLES :]
        if len(last) == period * CIRCLES and last == last[:period] * CIRCLES:
            return True
    return False


def calibration_error(items: Sequence[Asked], answers: Sequence[Answer]) -> float | None:
    """0 to 1; None where no item has choices and a label."""
    confidence, right = list[float](), list[bool]()
    for item, answer in zip(items, answers, strict=True):
        if answer.choice_log_probabilities and item.label is not None:
            shares = np.exp(np.array(answer.choice_log_probabilities) - max(answer.choice_log_probabilities))
            confidence.append(float(shares.max() / shares.sum()))
            right.append(item.choices[int(shares.argmax())] == item.label)
    if not confidence:
        return None
    bins = np.minimum((np.array(confidence) * BINS).astype(int), BINS - 1)
    gaps = [
        abs(np.mean(np.array(confidence)[bins == b]) - np.mean(np.array(right)[bins == b])) for b in np.unique(bins)
    ]
    return float(np.average(gaps, weights=[int((bins == b).sum()) for b in np.unique(bins)]))
