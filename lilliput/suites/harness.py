"""Tasks of lm-evaluation-harness (extra `lm-eval`) as suites: `lm-eval:NAME`, or `lm-eval:folder/task.yaml`.

The harness makes the prompts and scores the answers; what lies between is ours, so that the float model and every
artifact, on whatever device, are asked as by any other suite. Its requests become questions:

    loglikelihood, multiple_choice   the tokens that all requests of an item begin with, and what follows as choices;
                                     of a choice the first `given` tokens belong to the harness's context
    generate_until                   an open question, greedy; the text is cut at the first of the task's stops

An item's scores are the harness's own metrics of it, each a slice "TASK, METRIC": those that are means of a share from
0 to 1 and better where they are higher. Others are left out by name. Prompts are tokenized as the harness's own
Hugging Face model does, without a chat template. Data are never downloaded: a task is loaded offline.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import logging
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from lilliput.errors import InputError, MissingPackageError
from lilliput.results import Record

PREFIX = "lm-eval:"
DEFAULT_TOKENS = 256  # of an open answer, where the task does not say: as the harness's own models have it
Response = str | tuple[float, bool]  # to one request of the harness: a text, or log-probability and "greedy"


class HarnessItem(Record):
    """One document of a task. `choices` are the texts whose likelihood is asked, one a request."""

    suite: str
    task: str
    doc: int
    id: str
    slice: str
    prompt: str
    choices: tuple[str, ...] = ()
    until: tuple[str, ...] = ()

    @property
    def label(self) -> None:
        """The harness knows which is right."""
        return None


@dataclass(frozen=True)
class HarnessQuestion:
    """An item in tokens; `given` is how many tokens of each choice are context."""

    item: HarnessItem
    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    given: tuple[int, ...]
    max_tokens: int


def is_task(suite: str) -> bool:
    return suite.startswith(PREFIX)


def questions(suite: str, tokenizer: Any, count: int | None) -> Iterator[HarnessQuestion]:
    """The items of a task or a group, `count` a task, as questions. Raises InputError, MissingPackageError."""
    from lilliput.suites.harness_model import Reader

    for name, instances in _requests(suite, count):
        with _quiet():
            yield from _item_questions(suite, name, instances, Reader(tokenizer))


def _item_questions(suite: str, name: str, instances: list[Any], reader: Any) -> Iterator[HarnessQuestion]:
    for doc, its in _documents(instances).items():
        text = str(its[0].args[0])
        item = HarnessItem(suite=suite, task=name, doc=doc, id=f"{name} {doc}", slice=name, prompt=text)
        if its[0].request_type == "generate_until":
            prompt, until, most = reader.opened(its[0])
            yield HarnessQuestion(item.model_copy(update={"until": until}), prompt, (), (), most)
            continue
        pairs = reader.pairs(its)
        if not (shared := _shared([context + following for context, following in pairs], pairs)):
            raise InputError(f"suite {suite}: the requests of {name}'s document {doc} begin with different tokens")
        choices = tuple((context + following)[shared:] for context, following in pairs)
        given = tuple(len(context) - shared for context, _ in pairs)
        item = item.model_copy(update={"choices": tuple(one.args[1] for one in its)})
        yield HarnessQuestion(item, pairs[0][0][:shared], choices, given, 1)


def _shared(wholes: Sequence[tuple[int, ...]], pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> int:
    """How many tokens all requests begin with, within the shortest context."""
    most = min(len(context) for context, _ in pairs)
    return next((i for i in range(most) if len({whole[i] for whole in wholes}) > 1), most)


def scores(items: Sequence[HarnessItem], responses: Sequence[Sequence[Response]]) -> list[dict[str, float]]:
    """Of each item, its slices and their scores, from the responses to its requests."""
    found: dict[tuple[str, str, int], dict[str, float]] = {}
    for suite in dict.fromkeys(item.suite for item in items):
        its = [(item, said) for item, said in zip(items, responses, strict=True) if item.suite == suite]
        said = {(item.task, item.doc, i): one for item, ones in its for i, one in enumerate(ones)}
        found |= {(suite, *key): value for key, value in _judged(suite, said, len({i.doc for i, _ in its})).items()}
    return [found[item.suite, item.task, item.doc] for item in items]


def _judged(
    suite: str, said: dict[tuple[str, int, int], Response], count: int
) -> dict[tuple[str, int], dict[str, float]]:
    """By task and document: what the harness makes of responses, filter by filter."""
    found: dict[tuple[str, int], dict[str, float]] = {}
    for name, instances in _requests(suite, count):
        task = _load(suite)[name]
        for instance in instances:
            instance.resps = [said[name, int(instance.doc_id), instance.idx]]
        with _quiet(), _offline():
            task.apply_filters()
            for rule in instances[0].filtered_resps:
                for doc, its in _documents(instances).items():
                    metrics = task.process_results(its[0].doc, [one.filtered_resps[rule] for one in its])
                    shares = {metric: metrics[metric] for metric in metrics if metric in _shares(task)}
                    found.setdefault((name, doc), {}).update(_slices(suite, name, rule, shares))
    return found


def _documents(instances: Iterable[Any]) -> dict[int, list[Any]]:
    """The requests of each document, in their order."""
    found: dict[int, list[Any]] = {}
    for instance in sorted(instances, key=lambda one: one.idx):
        found.setdefault(int(instance.doc_id), []).append(instance)
    return dict(sorted(found.items()))


def _slices(suite: str, name: str, rule: str, metrics: Mapping[str, object]) -> dict[str, float]:
    """A slice's name has that of a filter, where the task has some."""
    tail = "" if rule == "none" else f" ({rule})"
    return {f"{name}, {metric}{tail}": _share(suite, metric, value) for metric, value in metrics.items()}


def _share(suite: str, metric: str, value: object) -> float:
    share = float(value) if isinstance(value, int | float) or hasattr(value, "__float__") else math.nan
    if not 0 <= share <= 1:
        raise InputError(f"suite {suite}: {metric} of an item is {value!r}, wanted a share from 0 to 1")
    return share


def cut(text: str, until: Sequence[str]) -> str:
    """A text up to the first of its stops."""
    from lm_eval.models.utils import postprocess_generated_text

    return str(postprocess_generated_text(text, list(until), None))


def left_out(suites: Iterable[str]) -> tuple[str, ...]:
    """Metrics of the tasks that no slice is made of, a sentence each."""
    return tuple(
        f"{suite}: {name}'s {', '.join(others)} left out: no mean of shares of items, better where it is higher"
        for suite in suites
        if is_task(suite)
        for name, task in _load(suite).items()
        if (others := sorted(set(task.aggregation()) - _shares(task)))
    )


def _shares(task: Any) -> set[str]:
    """The metrics that an item has a share of."""
    better = task.higher_is_better()
    return {m for m, how in task.aggregation().items() if getattr(how, "__name__", "") == "mean" and better.get(m)}


def sha256(suite: str, count: int | None) -> str:
    """Of all requests and documents that are asked, and of what the task says of itself."""
    digest = hashlib.sha256()
    for name, instances in _requests(suite, count):
        digest.update(json.dumps([name, _load(suite)[name].dump_config()], default=str, sort_keys=True).encode())
        for instance in instances:
            digest.update(json.dumps([instance.args, instance.doc], default=str, sort_keys=True).encode())
    return digest.hexdigest()


def _requests(suite: str, count: int | None) -> Iterator[tuple[str, list[Any]]]:
    """Each task's requests in the harness's order."""
    for name, task in _load(suite).items():
        with _quiet(), _offline():
            task.build_all_requests(limit=count)
        for instance in task.instances:
            if instance.request_type == "loglikelihood_rolling":
                raise InputError(
                    f"suite {suite}: {name} asks for the perplexity of documents: give them as evaluation.text"
                )
        yield name, list(task.instances)


@cache
def _load(suite: str) -> dict[str, Any]:
    """The tasks by name, with their data."""
    if importlib.util.find_spec("lm_eval") is None:
        raise MissingPackageError("lm_eval", "lm-eval", f"suite {suite!r}")
    from lm_eval.tasks import TaskManager

    spec = suite.removeprefix(PREFIX)
    is_file = spec.endswith((".yaml", ".yml"))
    if is_file and not Path(spec).is_file():
        raise InputError(f"suite {suite}: there is no file {spec}")
    with _quiet(), _offline():
        manager = TaskManager(include_defaults=not is_file)
        if not is_file and spec not in manager.all_tasks:
            raise InputError(f"suite {suite}: the harness knows no task or group {spec!r}: lm_eval ls tasks lists them")
        try:
            loaded: dict[str, Any] = manager.load(spec)["tasks"]
        except Exception as error:  # whatever a task's own code raises
            raise InputError(_why(suite, error)) from error
    for name, task in loaded.items():
        _check(suite, name, task)
    return loaded


def _why(suite: str, error: Exception) -> str:
    said = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, ConnectionError | FileNotFoundError) or "ffline" in f"{type(error).__name__} {said}":
        return (
            f"suite {suite}: its data are not on this machine, and nothing is downloaded ({said}): "
            "give the task a local dataset_path or data_files, or fetch its data into the cache of datasets first"
        )
    return f"suite {suite}: the harness cannot load it: {type(error).__name__}: {said}"


def _check(suite: str, name: str, task: Any) -> None:
    """Raise InputError for what is not asked."""
    settings = task.get_config("generation_kwargs") or {}
    if getattr(task, "UNSAFE_CODE", False):
        raise InputError(f"suite {suite}: {name} runs code that the model writes: refused")
    if getattr(task, "MULTIMODAL", False):
        raise InputError(f"suite {suite}: {name} asks about pictures or sound: only text is asked")
    if (task.get_config("repeats") or 1) > 1 or settings.get("do_sample") or settings.get("temperature"):
        raise InputError(f"suite {suite}: {name} draws samples: answers are greedy: set do_sample: false, repeats: 1")
    if not _shares(task):
        raise InputError(
            f"suite {suite}: none of {name}'s metrics ({', '.join(task.aggregation())}) is a share of items"
        )


@contextlib.contextmanager
def _offline() -> Iterator[None]:
    """Without the hub, whatever the environment says: what is cached is found, all else raises."""
    import datasets.config
    import evaluate.config
    import huggingface_hub.constants

    with (
        patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        patch.object(datasets.config, "HF_HUB_OFFLINE", True),
        patch.object(evaluate.config, "HF_EVALUATE_OFFLINE", True),
    ):
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the harness's progress bars and log."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
