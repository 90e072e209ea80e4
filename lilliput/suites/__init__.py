"""Suites: questions whose answers can be checked, by slice. One JSON object a line:

    {"prompt": "…", "slice": "json",                what is asked, and the slice that it counts to
     "expected": "Paris"                            the answer contains this, whatever the case
     "regex": "^\\d+$"                              or matches this (Python's re, searched in the stripped answer)
     "schema": {…}                                  or its first JSON value is valid under this JSON Schema
     "choices": ["yes", "no"], "label": "no"        or this choice is the likeliest continuation
     "ends": true                                   or it ends by itself within max_tokens, and does not run in circles
     "max_tokens": 32, "id": "…",
     "raw": true                                    the prompt is continued as it stands, without the chat template
     "haystack": {"needle": "…", "depth": 0.5, "fill": 0.7}}

A haystack puts other text (docstrings of Python's library) before the question, up to a share `fill` of the model's
context, and the needle into it at a share `depth` of its length. The built-in suites lie beside this file; a user's own
are files of the same kind. Only weak claims are made of a small model: each slice is held against the float model.

A task of lm-evaluation-harness is a suite too, `lm-eval:TASK` (lilliput.suites.harness).

All items of a user's file are asked, and of a built-in slice FIRST at the least, as templates make more of them
(lilliput.suites.templates). A number of items a slice takes the first of a file's, and as many of a built-in slice.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any, Self

from pydantic import Field, JsonValue, ValidationError, model_validator

from lilliput.errors import InputError, did_you_mean
from lilliput.results import Record
from lilliput.suites import harness, templates

FIRST = 12  # fewer could not tell a loss of a fifth from none
CHECKS = ("expected", "regex", "schema", "label", "ends")


class Haystack(Record):
    """Long text around a fact that the question asks for."""

    needle: str = Field(min_length=1)
    depth: float = Field(ge=0, le=1)
    fill: float = Field(default=0.75, gt=0, le=0.9)


class Item(Record):
    """One question and how its answer is checked."""

    prompt: str = Field(min_length=1)
    slice: str = Field(min_length=1)
    id: str = ""  # load() names an item without one by its file and line
    expected: str | None = None
    regex: str | None = None
    json_schema: dict[str, JsonValue] | None = Field(default=None, alias="schema")
    choices: tuple[str, ...] = ()
    label: str | None = None
    ends: bool = False
    raw: bool = False
    max_tokens: int = Field(default=32, ge=1)
    haystack: Haystack | None = None

    @model_validator(mode="after")
    def _one_check(self) -> Self:
        asked = [name for name, value in zip(CHECKS, self._checks(), strict=True) if value]
        if len(asked) != 1:
            raise ValueError(f"wanted one of {', '.join(CHECKS)}, seen {', '.join(asked) or 'none'}")
        if self.label is not None and (len(self.choices) < 2 or self.label not in self.choices):
            raise ValueError(f"label {self.label!r} is to be one of at least two choices, seen {list(self.choices)}")
        if self.regex is not None:
            try:
                re.compile(self.regex)
            except re.error as error:
                raise ValueError(f"regex {self.regex!r}: {error}") from error
        return self

    def _checks(self) -> tuple[object, ...]:
        return self.expected, self.regex, self.json_schema, self.label, self.ends


def known() -> tuple[str, ...]:
    """The built-in suites' names."""
    return tuple(sorted(path.stem for path in Path(__file__).parent.glob("*.jsonl")))


def path_of(suite: str) -> Path:
    """The file of a built-in suite, or a user's own. Raises InputError where there is neither."""
    if suite in known():
        return Path(__file__).with_name(f"{suite}.jsonl")
    if not Path(suite).is_file():
        raise InputError(f"suite {suite!r} is neither a file nor built in: {did_you_mean(suite, known())}")
    return Path(suite)


def load(suite: str, count: int | None = None) -> tuple[Item, ...]:
    """The items of a built-in suite or a JSONL file, `count` a slice where it is given and the suite has so many.

    Raises InputError naming the line that is wrong.
    """
    items = _read(suite)
    slices: dict[str, list[Item]] = {}
    for item in items:
        slices.setdefault(item.slice, []).append(item)
    if suite in known():
        slices = {name: _filled(name, its, count or FIRST) for name, its in slices.items()}
    return tuple(item for its in slices.values() for item in its[:count])


def _filled(name: str, items: list[Item], count: int) -> list[Item]:
    """A built-in slice with items from its templates, so far as they go."""
    made = templates.more(name, [templates.key(item.model_dump(by_alias=True)) for item in items])
    fields = itertools.islice(made, max(0, count - len(items)))
    return items + [Item.model_validate({"id": f"{name} {n}", **its}) for n, its in enumerate(fields, len(items) + 1)]


def _read(suite: str) -> tuple[Item, ...]:
    path = path_of(suite)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"suite {path} cannot be read as UTF-8 text: {error}") from error
    items = tuple(_item(line, path, number) for number, line in enumerate(lines, 1) if line.strip())
    if not items:
        raise InputError(f"suite {path} is empty: wanted a JSON object a line")
    return items


def _item(line: str, path: Path, number: int) -> Item:
    try:
        found: Any = json.loads(line)
        item = Item.model_validate_json(line)
    except json.JSONDecodeError as error:
        raise InputError(f"suite {path}, line {number}: no JSON ({error})") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "the item"
        raise InputError(f"suite {path}, line {number}: {where}: {first['msg']}") from error
    assert isinstance(found, dict)
    if item.json_schema is not None:
        _check_schema(item.json_schema, path, number)
    return item.model_copy(update={"id": item.id or f"{path.stem}-{number}"})


def _check_schema(schema: dict[str, JsonValue], path: Path, number: int) -> None:
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError

    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as error:
        raise InputError(f"suite {path}, line {number}: schema: {error.message}") from error


def sha256(suite: str, count: int | None) -> str:
    """Of a suite's file; of a harness's task, what is asked of it."""
    if harness.is_task(suite):
        return harness.sha256(suite, count)
    return hashlib.sha256(path_of(suite).read_bytes()).hexdigest()
