"""Tasks of lm-evaluation-harness as suites: its own Hugging Face model is the oracle of what the float model scores."""

from __future__ import annotations

import json
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import tiny_recipe

from lilliput import pipeline, suites
from lilliput.errors import InputError, MissingPackageError
from lilliput.suites import harness

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

DOCS = [
    {"q": "a quick brown fox", "options": ["jumps", "sleeps", "a dog"], "gold": 0, "one": "x"},
    {"q": "the lazy dog", "options": ["barks", "is lazy", "over"], "gold": 1, "one": "y"},
    {"q": "a fox and a dog", "options": ["play", "jump over", "fox"], "gold": 2, "one": "z"},
]
COMMON = "dataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
CHOICE = """\
task: tiny_choice
output_type: multiple_choice
doc_to_text: "{{{{q}}}}"
doc_to_choice: options
doc_to_target: gold
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
  - {{metric: f1, aggregation: f1, higher_is_better: true}}
"""
WORD = """\
task: tiny_word
output_type: loglikelihood
doc_to_text: "{{{{q}}}}"
doc_to_target: " {{{{options[0]}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
OPEN = """\
task: tiny_open
output_type: generate_until
doc_to_text: "{{{{q}}}}"
doc_to_target: "{{{{one}}}}"
generation_kwargs: {{until: ["\\n\\n", " a"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""


def write(folder: Path, name: str, text: str, common: str = COMMON) -> str:
    """A task's file with its data beside it; the suite's name."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in DOCS))
    path = folder / f"{name}.yaml"
    path.write_text((text + common).format(data=data))
    return f"{harness.PREFIX}{path}"


@dataclass(frozen=True)
class Said:
    """What the harness's own model answers to one document, and what the task makes of it."""

    responses: list[Any]
    metrics: dict[str, float]


def oracle(hf: Path, suite: str) -> dict[int, Said]:
    """By document of a suite that is one task."""
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model = HFLM(pretrained=str(hf), device="cpu", dtype="float32", batch_size=1)
    manager = TaskManager(include_defaults=False)
    ((_, task),) = manager.load(suite.removeprefix(harness.PREFIX))["tasks"].items()
    task.build_all_requests()
    for instance, said in zip(
        task.instances, getattr(model, task.instances[0].request_type)(task.instances), strict=True
    ):
        instance.resps = [said]
    task.apply_filters()
    found = {}
    for doc in range(len(DOCS)):
        its = [one for one in task.instances if one.doc_id == doc]
        metrics = task.process_results(its[0].doc, [one.filtered_resps["none"] for one in its])
        found[doc] = Said([one.resps[0] for one in its], metrics)
    return found


def test_a_recipe_asks_the_harnesss_tasks_and_the_float_model_scores_what_the_harness_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "cache"))
    names = [write(tmp_path, "choice", CHOICE), write(tmp_path, "word", WORD), write(tmp_path, "open", OPEN)]
    hf = tiny_models.tiny_llama(tmp_path / "hf")
    recipe = tiny_recipe.recipe(
        tmp_path,
        hf,
        f"evaluation.suites={json.dumps(names)}",
        "gates=[{metric: slice_drop, max: 1}]",
        targets=("gguf",),
    )
    (target,) = pipeline.run(pipeline.plan(recipe, out=tmp_path / "out")).report.targets
    assert target.suites is not None
    ours = {found.name: found for found in target.suites.slices}
    theirs = {f"tiny_{name}": oracle(hf, suite) for name, suite in zip(("choice", "word", "open"), names, strict=True)}
    for slice_name, found in ours.items():
        task, _, metric = slice_name.partition(", ")
        assert found.float_score == pytest.approx(np.mean([said.metrics[metric] for said in theirs[task].values()]))
        assert found.items == len(DOCS)
    assert set(ours) == {"tiny_choice, acc", "tiny_choice, acc_norm", "tiny_word, acc", "tiny_open, exact_match"}
    assert any("tiny_choice's f1 left out" in note for note in target.notes)
    assert {f"slice_drop {name}" for name in ours} <= {gate.name for gate in target.gates}
    _same_answers(tmp_path / "cache", hf, theirs)


def _same_answers(cache: Path, hf: Path, theirs: dict[str, dict[int, Said]]) -> None:
    """The float model's log-probabilities and texts are those of the harness's model."""
    from lilliput.stages.suites import items_in
    from lilliput.tokenizer_folder import load_tokenizer
    from targets.answers import load_answers

    tokenizer = load_tokenizer(hf)
    (items,), (answers,) = (list((cache / kind).glob("*/")) for kind in ("suites", "answers"))
    for item, answer in zip(items_in(items), load_answers(answers / "answers.json"), strict=True):
        assert isinstance(item, harness.HarnessItem)
        wanted = theirs[item.task][item.doc].responses
        if item.choices:
            assert answer.choice_log_probabilities == pytest.approx([value for value, _ in wanted], abs=1e-3)
            assert list(answer.choice_greedy) == [greedy for _, greedy in wanted]
        else:
            assert [harness.cut(tokenizer.decode(answer.tokens, skip_special_tokens=True), item.until)] == wanted


def test_contexts_that_differ_are_weighed_from_where_they_part(tmp_path: Path) -> None:
    text = """\
task: tiny_inputs
output_type: multiple_choice
doc_to_text: gold
doc_to_choice: "{{{{[q + ' ' + options[0], q + ' ' + options[1]]}}}}"
doc_to_target: "over it"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
    from lilliput.tokenizer_folder import load_tokenizer

    tokenizer = load_tokenizer(tiny_models.tiny_llama(tmp_path / "hf"))
    (asked, *_) = harness.questions(write(tmp_path, "inputs", text), tokenizer, 2)
    assert len(asked.choices) == 2
    for choice, given, option in zip(asked.choices, asked.given, DOCS[0]["options"], strict=False):  # type: ignore[call-overload]
        assert tokenizer.decode([*asked.prompt, *choice[:given]]) == f"a quick brown fox {option}"
        assert tokenizer.decode(choice[given:]).strip() == "over it"


def test_the_number_of_documents_is_the_recipes_and_the_key_sees_the_data(tmp_path: Path) -> None:
    from lilliput.tokenizer_folder import load_tokenizer

    tokenizer = load_tokenizer(tiny_models.tiny_llama(tmp_path / "hf"))
    suite = write(tmp_path, "choice", CHOICE)
    assert [asked.item.doc for asked in harness.questions(suite, tokenizer, 2)] == [0, 1]
    first = suites.sha256(suite, 2)
    assert first == suites.sha256(suite, 2) != suites.sha256(suite, 3)
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({**doc, "q": "else"}) + "\n" for doc in DOCS))
    harness._load.cache_clear()
    assert suites.sha256(suite, 2) != first


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            ("dataset_path: json", "dataset_path: some/where"),
            "its data are not on this machine, and nothing is downloaded",
        ),
        (("data_files: {{test: {data}}}", "data_files: {{test: /no/such.jsonl}}"), "its data are not on this machine"),
        (("output_type: generate_until", "output_type: loglikelihood_rolling"), "perplexity of documents"),
        (("do_sample: false", "do_sample: true, temperature: 0.5"), "draws samples"),
        (("metric: exact_match, aggregation: mean", "metric: exact_match, aggregation: median"), "is a share of items"),
        (
            ("output_type: generate_until", "output_type: generate_until\nunsafe_code: true"),
            "code that the model writes",
        ),
    ],
)
def test_what_is_not_asked_is_refused_by_name_and_nothing_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: tuple[str, str], words: str
) -> None:
    def connect(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", connect)
    monkeypatch.setattr(socket.socket, "connect", connect)
    assert any(change[0] in text for text in (OPEN, COMMON))
    suite = write(tmp_path, "refused", OPEN.replace(*change), COMMON.replace(*change))
    with pytest.raises(InputError) as caught:
        suites.sha256(suite, None)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_task_and_a_missing_harness_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="there is no file"):
        suites.sha256(f"{harness.PREFIX}{tmp_path}/none.yaml", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"lilliput\[lm-eval\]"):
        suites.sha256("lm-eval:arc_easy", None)
