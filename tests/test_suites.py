"""Suites: the built-in ones are well-formed, a user's own file is read or refused by line, items become questions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tiny_models

from lilliput import suites
from lilliput.errors import InputError
from lilliput.progress import silent
from lilliput.stages import suites as stage
from lilliput.tokenizer_folder import load_tokenizer
from targets.answers import QUESTIONS, Question, load_questions

SIX_LANGUAGES = {"German", "French", "Spanish", "Russian", "Chinese", "Arabic"}


@pytest.mark.parametrize("name", suites.known())
def test_every_built_in_suite_loads_and_names_its_items_once(name: str) -> None:
    items = suites.load(name)
    assert len({item.id for item in items}) == len(items) >= 8
    for name_of_slice in {item.slice for item in items}:
        assert sum(item.slice == name_of_slice for item in items) >= suites.FIRST


@pytest.mark.parametrize("name", suites.known())
def test_a_built_in_slice_has_more_that_begins_with_what_was_asked_before(name: str) -> None:
    few, many = suites.load(name, 20), suites.load(name, 30)
    for name_of_slice in {item.slice for item in few}:
        asked, more = ([item for item in items if item.slice == name_of_slice] for items in (few, many))
        assert (len(asked), len(more)) == (20, 30)
        assert more[:20] == asked
        assert len({(item.prompt, item.haystack) for item in more}) == 30
    assert suites.load(name, 30) == many


def test_the_number_that_is_wanted_is_not_one_that_the_question_says() -> None:
    import re

    for item in suites.load("arithmetic", 60)[12:]:
        assert item.regex is not None
        assert re.search(item.regex, item.prompt) is None


def test_a_templates_answer_is_right_and_lies_in_the_text_that_is_asked_about() -> None:
    """A reader of the sentences computes what the templates say."""
    import re

    for item in suites.load("arithmetic", 60)[12:]:
        a, b, *rest = (int(number) for number in re.findall(r"\d+", item.prompt))
        times = item.prompt.startswith(("A box", "A ticket"))
        wanted = (a * b if times else a + b) - sum(rest)
        assert re.search(str(item.regex), f"It is {wanted}.")
    for item in suites.load("extraction", 60):
        assert str(item.expected) in item.prompt.partition("\n\n")[0]
    for item in suites.load("retrieval", 30):
        assert item.haystack is not None
        assert str(item.expected) in item.haystack.needle
        assert str(item.expected) not in item.prompt


FOLLOWING = {
    "После вторника идёт": "среда",
    "Nach dem Dezember kommt der": "Januar",
    "六月之后是": "七月",
    "La capitale du Japon est": "Tokyo",
    "بعد شهر يناير يأتي شهر": "فبراير",
    "La capital de Egipto es": "El Cairo",
}


def test_a_language_says_what_comes_next_in_its_own_words() -> None:
    asked = {item.prompt: item.label for item in suites.load("languages", 40)}
    found = {prompt: label for prompt, label in FOLLOWING.items() if prompt in asked}
    assert len(found) >= 4
    assert {prompt: asked[prompt] for prompt in found} == found


def test_the_first_of_a_file_are_taken_slice_by_slice(tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    lines = [{"prompt": f"{s}{n}", "slice": s, "expected": "x"} for s in "ab" for n in range(4)]
    own.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert [item.prompt for item in suites.load(str(own), 2)] == ["a0", "a1", "b0", "b1"]
    assert len(suites.load(str(own), 9)) == len(suites.load(str(own))) == 8


def test_the_built_in_suites_cover_what_is_judged() -> None:
    names = {item.slice for name in suites.known() for item in suites.load(name)}
    assert names >= SIX_LANGUAGES | {"instructions", "json", "tool calls", "extraction", "classification"}
    assert names >= {"arithmetic", "termination", "retrieval at 10 %", "retrieval at 50 %", "retrieval at 90 %"}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2: no JSON"),
        ('{"prompt": "a", "slice": "s"}', "wanted one of expected, regex, schema, label, ends, seen none"),
        ('{"prompt": "a", "slice": "s", "expected": "b", "ends": true}', "seen expected, ends"),
        ('{"prompt": "a", "slice": "s", "label": "b", "choices": ["c", "d"]}', "to be one of at least two choices"),
        ('{"prompt": "a", "slice": "s", "regex": "("}', "regex '('"),
        ('{"prompt": "a", "slice": "s", "schema": {"type": "nothing"}}', "line 2: schema: 'nothing'"),
        ('{"prompt": "a", "slice": "s", "expect": "b"}', "line 2: expect: Extra inputs"),
    ],
)
def test_a_wrong_line_is_named(line: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    file.write_text('{"prompt": "a", "slice": "s", "expected": "b"}\n' + line + "\n")
    with pytest.raises(InputError, match="own") as caught:
        suites.load(str(file))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_suite_is_told_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="did you mean 'retrieval'"):
        suites.load("retreival")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(InputError, match="is empty"):
        suites.load(str(tmp_path / "empty.jsonl"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A source stage's folder, tiny."""
    from lilliput.source import load

    folder = tmp_path_factory.mktemp("source")
    load(str(tiny_models.tiny_llama(folder / "hf")), folder / "stage", proof=False)
    return folder / "stage"


def questions(source: Path, folder: Path, context: int, *lines: dict[str, object]) -> tuple[Question, ...]:
    (folder / "own.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    stage.work(source, [str(folder / "own.jsonl")], None, context, folder, silent)
    assert stage.items_in(folder) == suites.load(str(folder / "own.jsonl"))
    return load_questions(folder / QUESTIONS)


def test_a_prompt_goes_through_the_chat_template_unless_it_is_raw(source: Path, tmp_path: Path) -> None:
    ask = {"prompt": "add", "slice": "s", "label": "fox", "choices": ["fox", "dog"]}
    chat, raw = questions(source, tmp_path, 64, ask, {**ask, "raw": True})
    tokenizer = load_tokenizer(source / "tokenizer")
    assert tokenizer.decode(chat.prompt) == "<|start|>user\nadd<|end|>\n<|start|>assistant\n"
    assert [tokenizer.decode(choice) for choice in chat.choices] == ["fox", "dog"]
    assert tokenizer.decode(raw.prompt) == "add"
    assert [tokenizer.decode(choice) for choice in raw.choices] == [" fox", " dog"]
    assert chat.stop_tokens == (1,)


@pytest.mark.parametrize("depth", [0.1, 0.9])
def test_a_needle_lies_at_its_depth_of_a_haystack_that_fills_its_share(
    source: Path, tmp_path: Path, depth: float
) -> None:
    hay = {"needle": "The key is 7351.", "depth": depth, "fill": 0.5}
    (found,) = questions(source, tmp_path, 4096, {"prompt": "Key?", "slice": "s", "expected": "7351", "haystack": hay})
    text = load_tokenizer(source / "tokenizer").decode(found.prompt)
    assert text.count("The key is 7351.") == 1
    assert text.index("7351") / len(text) == pytest.approx(depth, abs=0.05)
    assert len(found.prompt) == pytest.approx(2048, rel=0.05)


def test_a_question_that_does_not_fit_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"suites: own-1 has \d+ tokens and 32 for its answer, the context is 40"):
        questions(source, tmp_path, 40, {"prompt": "word " * 20, "slice": "s", "expected": "x"})


def test_a_recipe_asks_its_suites_of_every_target_and_the_report_shows_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tiny_recipe

    from lilliput import pipeline

    monkeypatch.setenv("LILLIPUT_CACHE", str(tmp_path / "cache"))
    own = tmp_path / "own.jsonl"
    own.write_text(
        '{"prompt": "fox?", "slice": "foxes", "regex": ".", "max_tokens": 6}\n'
        '{"prompt": "dog?", "slice": "dogs", "choices": ["yes", "no"], "label": "no"}\n'
    )
    hf = tiny_models.tiny_llama(tmp_path / "hf")
    settings = (f"evaluation.suites=[{own}]", "gates=[{metric: slice_drop, max: 1}]")
    recipe = tiny_recipe.recipe(tmp_path, hf, *settings, targets=("onnx",))
    made = pipeline.run(pipeline.plan(recipe, out=tmp_path / "out")).report
    (target,) = made.targets
    assert target.suites is not None
    assert [s.name for s in target.suites.slices] == ["foxes", "dogs"]
    assert {"slice_drop foxes", "slice_drop dogs"} <= {gate.name for gate in target.gates}
    table = "| foxes | 1 | "
    assert table in (tmp_path / "out" / "report.md").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    assert '<td class="who"><b>foxes</b></td>' in page
    assert "Expected calibration error" in page
    again = pipeline.run(pipeline.plan(recipe, out=tmp_path / "out")).report
    assert all(stage.cached for stage in again.stages if stage.name != "report")
