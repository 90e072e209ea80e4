"""Questions put to an open session, and its answers: what the float model and every artifact are asked alike.

    questions.json      [Question]
    answers.json        [Answer], in the same order
    logits.npy          (rows, vocab) float32, of the float model: each answer's rows one after the other

An open question is answered greedily. Its rows are the logits that predict each token of the float model's answer, and
the stop token where it came to one; a question with choices has one row, after the prompt. A candidate is led along the
float model's answer, which gives its divergence there, and says its own where it would have left that path.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from pydantic import TypeAdapter

from lilliput.errors import MeasurementError
from lilliput.grid import Float
from lilliput.progress import Progress, silent
from lilliput.results import Record
from targets.base import Session
from targets.metrics import divergence, log_softmax

QUESTIONS, ANSWERS, LOGITS = "questions.json", "answers.json", "logits.npy"


class Question(Record):
    """A tokenized item of a suite. `choices` are weighed; without them the answer is at most `max_tokens` long.

    Of a choice the first `given` tokens belong to what comes before it: they are not weighed.
    """

    id: str
    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...] = ()
    given: tuple[int, ...] = ()  # of each choice; (): none
    max_tokens: int
    stop_tokens: tuple[int, ...]


class Answer(Record):
    """`tokens` without the stop token; `finished` where one came. Divergence in nats a row, from the float model."""

    tokens: tuple[int, ...] = ()
    finished: bool = False
    choice_log_probabilities: tuple[float, ...] = ()
    choice_greedy: tuple[bool, ...] = ()  # whether each token of a choice is the likeliest in its place
    mean_kld: float | None = None  # None: the float model's own

    @property
    def rows(self) -> int:
        """Logits of the float model's answer."""
        return 1 if self.choice_log_probabilities else len(self.tokens) + self.finished


_QUESTIONS, _ANSWERS = TypeAdapter(tuple[Question, ...]), TypeAdapter(tuple[Answer, ...])


def save_questions(questions: Sequence[Question], folder: Path) -> None:
    (folder / QUESTIONS).write_bytes(_QUESTIONS.dump_json(tuple(questions)))


def load_questions(path: Path) -> tuple[Question, ...]:
    return _QUESTIONS.validate_json(path.read_bytes())


def save_answers(answers: Sequence[Answer], path: Path) -> None:
    path.write_bytes(_ANSWERS.dump_json(tuple(answers)))


def load_answers(path: Path) -> tuple[Answer, ...]:
    return _ANSWERS.validate_json(path.read_bytes())


def answer_all(session: Session, questions: Sequence[Question], folder: Path, progress: Progress = silent) -> None:
    """The float model's answers and their logits, into `folder`."""
    answers, rows = list[Answer](), list[Float]()
    for done, question in enumerate(questions):
        answer, its = _first_answer(session, question)
        answers.append(answer)
        rows += its
        progress(done + 1, len(questions))
    save_answers(answers, folder / ANSWERS)
    np.save(folder / LOGITS, np.stack(rows))


def compare_all(
    session: Session, questions: Sequence[Question], reference: Path, progress: Progress = silent
) -> tuple[Answer, ...]:
    """A candidate's answers, each with its divergence from the float model's in the folder `reference`."""
    logits: Float = np.load(reference / LOGITS, mmap_mode="r")
    answers, start = list[Answer](), 0
    for question, wanted in zip(questions, load_answers(reference / ANSWERS), strict=True):
        answers.append(_compared(session, question, wanted, logits[start : start + wanted.rows]))
        start += wanted.rows
        progress(len(answers), len(questions))
    return tuple(answers)


def _first_answer(session: Session, question: Question) -> tuple[Answer, list[Float]]:
    """With the rows of logits that it was read from."""
    if question.choices:
        first, weighed = _weigh(session, question)
        return weighed, [first]
    session.reset()
    rows, tokens = [session.prefill(question.prompt)], list[int]()
    while (token := int(rows[-1].argmax())) not in question.stop_tokens:
        tokens.append(token)
        if len(tokens) == question.max_tokens:
            return Answer(tokens=tuple(tokens)), rows
        rows.append(session.decode(token))
    return Answer(tokens=tuple(tokens), finished=True), rows


def _compared(session: Session, question: Question, wanted: Answer, rows: Float) -> Answer:
    if question.choices:
        first, weighed = _weigh(session, question)
        return weighed.model_copy(update={"mean_kld": _divergence(rows[0], first, question)})
    found, same = list[float](), True
    path = itertools.zip_longest(wanted.tokens, rows, _led(session, question, wanted))
    for token, reference, logits in path:
        found.append(_divergence(reference, logits, question))
        chosen = int(logits.argmax())
        same &= chosen in question.stop_tokens if token is None else chosen == token
    own = wanted if same else _first_answer(session, question)[0]
    return own.model_copy(update={"mean_kld": float(np.mean(found))})


def _led(session: Session, question: Question, wanted: Answer) -> Iterator[Float]:
    """Logits along the float model's answer, a row for each of its own."""
    session.reset()
    yield session.prefill(question.prompt)
    for token in wanted.tokens[: wanted.rows - 1]:
        yield session.decode(token)


def _divergence(reference: Float, logits: Float, question: Question) -> float:
    if logits.shape != reference.shape:
        raise MeasurementError(f"the runtime's logits are {logits.shape}, wanted {reference.shape}")
    p = log_softmax(reference, f"the float model, {question.id}")
    return divergence(p, log_softmax(logits, f"the runtime, {question.id}"))


def _weigh(session: Session, question: Question) -> tuple[Float, Answer]:
    """The logits after the prompt, and each choice after it."""
    session.reset()
    first = session.prefill(question.prompt)
    found, greedy = list[float](), list[bool]()
    for choice, given in zip(question.choices, question.given or (0,) * len(question.choices), strict=True):
        rows = [first]
        if len(choice) > 1:
            session.reset()
            session.prefill(question.prompt)
            rows += [session.decode(token) for token in choice[:-1]]
        weighed = list(zip(choice, rows, strict=True))[given:]
        found.append(sum(float(log_softmax(row, question.id)[token]) for token, row in weighed))
        greedy.append(all(int(row.argmax()) == token for token, row in weighed))
    return first, Answer(choice_log_probabilities=tuple(found), choice_greedy=tuple(greedy))
