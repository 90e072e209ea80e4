"""Slices: how answers are checked, what a slice lost, and a whole suite asked of an artifact in a worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_validate import PROTOCOL, candidate, smoke
from tiny_setting import Setting

from lilliput import decoder
from lilliput.results import Gate, TargetResult
from lilliput.suites import Item
from targets.answers import Answer, Question, answer_all, compare_all, load_answers, save_questions
from targets.devices.host import Device, Options
from targets.metrics import divergence, log_softmax
from targets.runtimes.torch_cpu import Runtime, TorchSession
from targets.slices import calibration_error, figures, in_circles, json_values, paired_interval, scores
from targets.validate import Asked, Candidate, Place, References, validate

WORDS = ["Paris", " is", ' {"a": 1}', " and", " [2", "]"]


def decode(tokens: Sequence[int]) -> str:
    return "".join(WORDS[token] for token in tokens)


def item(**check: object) -> Item:
    return Item.model_validate({"prompt": "?", "slice": "s", **check})


@pytest.mark.parametrize(
    ("check", "tokens", "wanted"),
    [
        ({"expected": "pARIS  is"}, (0, 1), {"s": 1}),
        ({"expected": "Rome"}, (0, 1), {"s": 0}),
        ({"regex": "^Paris$"}, (0,), {"s": 1}),
        ({"regex": "^Paris$"}, (0, 1), {"s": 0}),
        ({"schema": {"required": ["a"]}}, (0, 2, 3), {"s": 1, "s, parses": 1}),
        ({"schema": {"required": ["b"]}}, (0, 2, 3), {"s": 0, "s, parses": 1}),
        ({"schema": {"type": "array"}}, (0, 4), {"s": 0, "s, parses": 0}),
        ({"schema": {"type": "array"}}, (0, 4, 5), {"s": 1, "s, parses": 1}),
        ({"ends": True}, (0, 1), {"s": 1}),
        ({"ends": True}, (0, 1) * 4, {"s": 0}),
    ],
)
def test_an_answer_is_checked(check: dict[str, object], tokens: tuple[int, ...], wanted: dict[str, float]) -> None:
    assert scores(item(**check), Answer(tokens=tokens, finished=True), decode) == wanted


def test_an_answer_that_was_cut_off_did_not_end() -> None:
    assert scores(item(ends=True), Answer(tokens=(0, 1), finished=False), decode) == {"s": 0}


def test_the_likeliest_choice_is_what_was_said() -> None:
    asked = item(choices=["no", "yes"], label="yes")
    assert scores(asked, Answer(choice_log_probabilities=(-3, -1)), decode) == {"s": 1}
    assert scores(asked, Answer(choice_log_probabilities=(-1, -3)), decode) == {"s": 0}


def test_circles_are_runs_that_repeat_to_the_end() -> None:
    assert in_circles([9, 1, 2, 1, 2, 1, 2, 1, 2])
    assert not in_circles([1, 2, 1, 2, 1, 2])
    assert not in_circles([1, 2, 1, 2, 1, 2, 1, 2, 3])


def test_the_first_json_value_is_taken_whatever_stands_around_it() -> None:
    assert list(json_values("Sure {here}: ```json\n[1, 2]\n``` or {}")) == [[1, 2]]
    assert list(json_values("{'a': 1}")) == []


def test_calibration_error_is_the_gap_between_confidence_and_accuracy() -> None:
    asked = [item(choices=["no", "yes"], label="yes")] * 4
    sure = Answer(choice_log_probabilities=(float(np.log(0.05)), float(np.log(0.95))))
    wrong = Answer(choice_log_probabilities=(float(np.log(0.95)), float(np.log(0.05))))
    assert calibration_error(asked, [sure] * 4) == pytest.approx(0.05)
    assert calibration_error(asked, [sure, sure, wrong, wrong]) == pytest.approx(0.45)
    assert calibration_error([item(ends=True)], [Answer()]) is None


def test_a_slice_says_what_was_lost_with_a_paired_interval_and_an_example() -> None:
    asked = [item(id=str(i), expected="Paris") for i in range(8)]
    right, wrong = Answer(tokens=(0,), finished=True), Answer(tokens=(1,), finished=True, mean_kld=0.5)
    kept = right.model_copy(update={"mean_kld": 0.1})
    (found,) = figures(asked, [right] * 8, [kept] * 6 + [wrong] * 2, decode).slices
    assert (found.items, found.float_score, found.score, found.drop) == (8, 1, 0.75, 0.25)
    assert found.drop_interval.low < 0.25 < found.drop_interval.high
    assert found.mean_kld == pytest.approx((6 * 0.1 + 2 * 0.5) / 8)
    assert found.chance == 0
    assert (found.lost[0].id, found.lost[0].float_answer, found.lost[0].answer) == ("6", "Paris", "is")


def test_chance_is_a_guess_among_the_choices() -> None:
    asked = [item(id="a", choices=["no", "yes"], label="yes"), item(id="b", choices=["a", "b", "c", "d"], label="a")]
    said = [Answer(choice_log_probabilities=(-1.0,) * len(one.choices), mean_kld=0.1) for one in asked]
    (found,) = figures(asked, said, said, decode).slices
    assert found.chance == pytest.approx((1 / 2 + 1 / 4) / 2)


def test_the_interval_is_agresti_and_mins_and_has_a_width_where_nothing_changed() -> None:
    nothing = paired_interval([0] * 12)
    assert nothing.high == -nothing.low == pytest.approx(1.959964 / 14)
    some = paired_interval([1] * 5 + [-1] + [0] * 34)  # adjusted: 5.5 and 1.5 of 42
    deviation = ((5.5 + 1.5 - 4**2 / 42) ** 0.5) / 42
    assert (some.low, some.high) == pytest.approx((4 / 42 - 1.959964 * deviation, 4 / 42 + 1.959964 * deviation))
    rng = np.random.default_rng(0)
    outcomes = rng.choice([1, -1, 0], p=(0.12, 0.04, 0.84), size=(4000, 30))  # lost, won, the same: a true drop of 0.08
    held = [i.low <= 0.08 <= i.high for i in map(paired_interval, outcomes)]
    assert np.mean(held) >= 0.94


def test_the_interval_of_drops_between_holds_the_true_one() -> None:
    rng = np.random.default_rng(1)
    drops = rng.beta(2, 2, size=(4000, 20)) - rng.beta(2, 2.5, size=(4000, 20))
    true = 2 / 4 - 2 / 4.5
    assert np.mean([i.low <= true <= i.high for i in map(paired_interval, drops)]) >= 0.94


QUESTIONS = (
    Question(id="open", prompt=(5, 9, 200), max_tokens=6, stop_tokens=(1,)),
    Question(id="choice", prompt=(5, 9), choices=((7,), (8, 30)), max_tokens=1, stop_tokens=(1,)),
)
ITEMS = (item(id="open", regex="."), item(id="choice", choices=["seven", "eight"], label="seven"))


@pytest.fixture(scope="module")
def asked(setting: Setting, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """Two questions, answered by the float model."""
    folder = tmp_path_factory.mktemp("asked")
    save_questions(QUESTIONS, folder)
    answer_all(TorchSession(decoder.build(setting.source), 64), QUESTIONS, folder)
    return Asked(ITEMS, folder, folder, lambda tokens: "+".join(map(str, tokens)))


def test_the_float_model_against_itself_loses_nothing(setting: Setting, asked: Asked) -> None:
    session = TorchSession(decoder.build(setting.source), 64)
    for ours, theirs in zip(
        compare_all(session, QUESTIONS, asked.answers), load_answers(asked.answers / "answers.json"), strict=True
    ):
        assert ours.mean_kld == pytest.approx(0, abs=1e-9)
        assert ours.model_copy(update={"mean_kld": None}) == theirs


def test_answers_are_the_decoders_own_and_choices_its_log_probabilities(setting: Setting, asked: Asked) -> None:
    import torch

    model = decoder.build(setting.source)
    opened, chosen = load_answers(asked.answers / "answers.json")
    tokens = list(QUESTIONS[0].prompt)
    for wanted in opened.tokens:
        assert int(model(torch.tensor([tokens]))[0, -1].argmax()) == wanted
        tokens.append(wanted)
    logits = model(torch.tensor([[5, 9, 8]]))[0].double().log_softmax(-1)
    wanted = (float(logits[1, 7]), float(logits[1, 8] + logits[2, 30]))
    assert chosen.choice_log_probabilities == pytest.approx(wanted, abs=1e-4)


def test_divergence_is_taken_along_the_float_models_answer(setting: Setting, asked: Asked) -> None:
    session = Runtime().open(setting.artifact, 1)
    found = compare_all(session, QUESTIONS, asked.answers)
    wanted = load_answers(asked.answers / "answers.json")
    rows = np.load(asked.answers / "logits.npy")
    session.reset()
    steps = [session.prefill(QUESTIONS[0].prompt)]
    steps += [session.decode(token) for token in wanted[0].tokens[: wanted[0].rows - 1]]
    each = [divergence(log_softmax(p, "p"), log_softmax(q, "q")) for p, q in zip(rows, steps, strict=False)]
    assert found[0].mean_kld == pytest.approx(np.mean(each))
    assert found[0].mean_kld > 0


def run(setting: Setting, subject: Candidate, asked: Asked, folder: Path, runtime: str = "torch_cpu") -> TargetResult:
    folder.mkdir()
    references = References(setting.model, setting.evaluation, setting.float_model, setting.dequantized)
    place = Place(runtime, "host", Device().open(Options()), threads=1)
    limits = (Gate(metric="slice_drop", max=1.0),)
    return validate(subject, place, references, smoke(), limits, folder, PROTOCOL, asked)


def test_a_validation_asks_the_suite_and_judges_each_slice(setting: Setting, asked: Asked, tmp_path: Path) -> None:
    items = (ITEMS[0], ITEMS[1].model_copy(update={"slice": "t"}))
    found = run(setting, candidate(setting), replace(asked, items=items), tmp_path / "torch")
    assert found.suites is not None
    assert [s.name for s in found.suites.slices] == ["s", "t"]
    assert [(g.name, g.verdict) for g in found.gates[-2:]] == [("slice_drop s", "PASS"), ("slice_drop t", "PASS")]
    assert found.suites.calibration_error is not None
    assert TargetResult.model_validate_json(found.model_dump_json()) == found


def test_a_runtime_that_fails_leaves_its_slices_inconclusive(
    setting: Setting, asked: Asked, rogue: Path, tmp_path: Path
) -> None:
    artifact = replace(setting.artifact, folder=rogue, main_file="raise")
    (rogue / "raise").touch()
    found = run(setting, replace(candidate(setting), artifact=artifact, exact=None), asked, tmp_path / "r", "rogue")
    assert found.suites is None
    assert any(note.startswith("suites: ") and "the delegate is gone" in note for note in found.notes)
    assert (found.gates[-1].name, found.gates[-1].verdict) == ("slice_drop", "INCONCLUSIVE")
