"""More questions of the built-in slices than their files hold: sentences with words and numbers from tables put in.

Every slice has a few makers, which take turns; each draws from a generator whose seed is the slice's name. So question
k of a slice is the same on every machine, and more of them begin with those that were asked before. A question that
was there already is passed over. Where the tables are used up, the slice ends.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator

from lilliput.suites.words import (
    ACTIONS,
    ADJECTIVES,
    ANIMALS,
    CAPITALS,
    CITIES,
    COLOURS,
    DAYS,
    FIRMS,
    HOURS,
    KINDS,
    LANGUAGES,
    MONTHS,
    NAMES,
    NUMBERS,
    OPPOSITES,
    PLURALS,
    REVIEW,
    SENTENCES,
    THINGS,
    TOPIC,
    TOPICS,
    WORDS,
    Language,
)  # fmt: skip

Draw = random.Random
Fields = dict[str, object]  # of a lilliput.suites.Item
TRIES = 50  # drawn in a row without a new question: then the tables are used up
EXACT = "Answer with the exact words from the text."
CALL = 'Answer with a JSON object with the keys "name" and "arguments" and nothing else. User:'


def more(slice_name: str, taken: Collection[str]) -> Iterator[Fields]:
    """Fields of new questions of a slice, without end or until its tables are used up; `taken` are keys of old ones."""
    makers, seen, draw, misses = MAKERS.get(slice_name, ()), set(taken), Draw(slice_name), 0
    for turn in range(10**9 if makers else 0):
        if misses == TRIES:
            return
        fields = makers[turn % len(makers)](draw)
        misses += 1
        if fields and key(fields) not in seen:
            seen.add(key(fields))
            misses = 0
            yield {"slice": slice_name, **fields}


def key(fields: Fields) -> str:
    """What makes a question new: its words, and what is buried before them."""
    haystack = fields.get("haystack")
    return f"{fields['prompt']}\n{haystack['needle'] if isinstance(haystack, dict) else ''}"


def _number(value: int) -> str:
    """A regular expression that finds the number, and not as a part of another."""
    return rf"(?<![\d.]){value}(?!\d|\.\d)"


def _sum(text: str, *operands: int, result: int) -> Fields:
    """A question, or nothing where its answer is one of its own numbers: saying that again would be right."""
    if result in operands:
        return {}
    return {"prompt": f"{text} Give the number.", "regex": _number(result), "max_tokens": 96}


def _apples(draw: Draw) -> Fields:
    a, b = draw.randint(3, 20), draw.randint(2, 12)
    c, name = draw.randint(1, a - 1), draw.choice(NAMES)
    text = f"{name} has {a} apples, buys {b} more and eats {c}. How many apples are left?"
    return _sum(text, a, b, c, result=a + b - c)


def _eggs(draw: Draw) -> Fields:
    a, b = draw.randint(4, 12), draw.randint(2, 9)
    c = draw.randint(1, 5)
    text = f"A box holds {a} eggs. Someone buys {b} boxes, and {c} eggs break. How many whole eggs are there?"
    return _sum(text, a, b, c, result=a * b - c)


def _tickets(draw: Draw) -> Fields:
    a, b = draw.randint(3, 15), draw.randint(2, 9)
    text = f"A ticket costs {a} euros. How much do {b} tickets cost?"
    return _sum(text, a, b, result=a * b)


def _plus_minus(draw: Draw) -> Fields:
    a, b = draw.randint(5, 60), draw.randint(5, 40)
    c = draw.randint(1, a)
    return _sum(f"What is {a} + {b} - {c}?", a, b, c, result=a + b - c)


def _invoice(draw: Draw) -> Fields:
    number, firm, amount = draw.randint(1000, 9999), draw.choice(FIRMS), draw.randint(20, 900)
    question, wanted = draw.choice(
        [("What is the number of the invoice?", str(number)), ("Who issued the invoice?", firm),
         ("How much is to be paid?", str(amount))]
    )  # fmt: skip
    text = f"Invoice {number} was issued by {firm} for {amount} euros."
    return {"prompt": f"{text}\n\n{question} {EXACT}", "expected": wanted, "max_tokens": 24}


def _parcel(draw: Draw) -> Fields:
    (left, reached), day = draw.sample(CITIES, 2), draw.choice(DAYS)
    question, wanted = draw.choice(
        [("Which city did the parcel leave?", left), ("Which city did the parcel reach?", reached),
         ("On which day did it arrive?", day)]
    )  # fmt: skip
    text = f"The parcel left {left} and reached {reached} on {day}."
    return {"prompt": f"{text}\n\n{question} {EXACT}", "expected": wanted, "max_tokens": 24}


def _meeting(draw: Draw) -> Fields:
    name, hour, room = draw.choice(NAMES), draw.choice(HOURS), draw.randint(2, 48)
    question, wanted = draw.choice(
        [("At what time is the meeting?", hour), ("Who is to be met?", name), ("In which room is it?", str(room))]
    )
    text = f"You will meet {name} at {hour} in room {room}."
    return {"prompt": f"{text}\n\n{question} {EXACT}", "expected": wanted, "max_tokens": 24}


def _object(**properties: object) -> Fields:
    """A JSON Schema of an object that has these keys."""
    return {"type": "object", "properties": properties, "required": list(properties)}


def _person(draw: Draw) -> Fields:
    name, age = draw.choice(NAMES), draw.randint(18, 90)
    text = f'Write a JSON object with the keys "name" and "age" for {name}, who is {age}. Answer with JSON only.'
    return {"prompt": text, "schema": _object(name={"const": name}, age={"const": age}), "max_tokens": 48}


def _journey(draw: Draw) -> Fields:
    left, reached = draw.sample(CITIES, 2)
    text = f'Convert to JSON with the keys "from" and "to": The train goes from {left} to {reached}.'
    schema = _object(**{"from": {"const": left}, "to": {"const": reached}})
    return {"prompt": text, "schema": schema, "max_tokens": 48}


def _price(draw: Draw) -> Fields:
    thing, price = draw.choice(THINGS), draw.randint(2, 99)
    text = f'Convert to JSON with the keys "item" and "price": A {thing} costs {price} dollars.'
    schema = _object(item={"type": "string"}, price={"type": "number"})
    return {"prompt": text, "schema": schema, "max_tokens": 48}


def _call(draw: Draw) -> Fields:
    function, argument, words = draw.choice(ACTIONS)
    said = words.format(name=draw.choice(NAMES), city=draw.choice(CITIES), thing=draw.choice(THINGS))
    arguments = _object(**{argument: {"type": "string"}})
    schema = _object(name={"const": function}, arguments=arguments)
    return {"prompt": f"You can call {function}({argument}). {CALL} {said}", "schema": schema, "max_tokens": 64}


def _review(draw: Draw) -> Fields:
    label, thing = draw.choice(("positive", "negative")), draw.choice(THINGS)
    first, second = draw.sample(ADJECTIVES[label], 2)
    text = REVIEW.format(f"The {thing} is {first} and {second}.")
    return {"prompt": text, "choices": ("positive", "negative"), "label": label, "raw": True}


def _topic(draw: Draw) -> Fields:
    label = draw.choice(tuple(TOPICS))
    return {"prompt": TOPIC.format(draw.choice(TOPICS[label])), "choices": tuple(TOPICS), "label": label, "raw": True}


def _capitals(draw: Draw) -> Fields:
    word = draw.choice(WORDS)
    text = f"Write the word {word} in capital letters and nothing else."
    return {"prompt": text, "regex": rf"^\W*{word.upper()}\W*$", "max_tokens": 12}


def _repeat(draw: Draw) -> Fields:
    sentence = draw.choice(SENTENCES).format(colour=draw.choice(COLOURS), thing=draw.choice(THINGS))
    return {"prompt": f"Repeat this sentence exactly: {sentence}.", "expected": sentence, "max_tokens": 24}


def _list(draw: Draw) -> Fields:
    first, length = draw.randint(1, 12), draw.randint(3, 6)
    numbers = [str(n) for n in range(first, first + length)]
    text = f"List the numbers from {numbers[0]} to {numbers[-1]}, separated by commas."
    return {"prompt": text, "regex": ", ?".join(numbers), "max_tokens": 40}


def _begin(draw: Draw) -> Fields:
    word, kind = draw.choice(("Certainly", "Gladly", "Well", "Indeed", "Hello")), draw.choice(KINDS)
    text = f"Begin your answer with the word {word} and then name a {kind}."
    return {"prompt": text, "regex": rf"^\W*{word}", "max_tokens": 32}


def _comma(draw: Draw) -> Fields:
    text = f"Name three {draw.choice(PLURALS)}, separated by commas, on one line."
    return {"prompt": text, "regex": r"^[^\n,]+,[^\n,]+,[^\n,]+$", "max_tokens": 32}


def _ending(text: str) -> Fields:
    return {"prompt": text, "ends": True, "max_tokens": 48}


def _opposite(draw: Draw) -> Fields:
    return _ending(f"What is the opposite of {draw.choice(OPPOSITES)}?")


def _one(draw: Draw) -> Fields:
    return _ending(f"Name one {draw.choice(KINDS)}.")


def _after(draw: Draw) -> Fields:
    return _ending(f"Which month comes after {draw.choice(MONTHS)}?")


def _diet(draw: Draw) -> Fields:
    return _ending(f"What does a {draw.choice(ANIMALS)} eat? Answer in one sentence.")


def _buried(depth: float) -> Callable[[Draw], Fields]:
    def code(draw: Draw) -> Fields:
        colour, thing, number = draw.choice(COLOURS), draw.choice(THINGS), str(draw.randint(1000, 9999))
        needle = f"The code of the {colour} {thing} is {number}."
        return _needle(f"What is the code of the {colour} {thing}?", number, needle)

    def platform(draw: Draw) -> Fields:
        name, number = draw.choice(NAMES), draw.choice(NUMBERS)
        return _needle(
            f"From which platform does {name}'s train leave?", number, f"{name}'s train leaves from platform {number}."
        )

    def _needle(question: str, wanted: str, needle: str) -> Fields:
        haystack = {"needle": needle, "depth": depth, "fill": 0.7}
        return {"prompt": question, "expected": wanted, "max_tokens": 24, "haystack": haystack}

    def either(draw: Draw) -> Fields:
        return draw.choice((code, platform))(draw)

    return either


def _said_in(language: Language) -> Callable[[Draw], Fields]:
    """Capitals of countries, and what comes after a day and a month."""

    def capital(draw: Draw) -> Fields:
        country, city = draw.choice(CAPITALS[language.name])
        others = [other for _, other in CAPITALS[language.name] if other != city]
        return _weighed(draw, language.capital.format(country), city, others)

    def following(draw: Draw) -> Fields:
        sentence, circle = draw.choice(((language.after_day, language.days), (language.after_month, language.months)))
        at = draw.randrange(len(circle))
        wanted = circle[(at + 1) % len(circle)].nominative
        others = [word.nominative for word in circle if word.nominative not in (wanted, circle[at].nominative)]
        return _weighed(draw, sentence.format(circle[at].genitive), wanted, others)

    def either(draw: Draw) -> Fields:
        return draw.choice((capital, following))(draw)

    return either


def _weighed(draw: Draw, prompt: str, label: str, others: list[str]) -> Fields:
    choices = draw.sample([label, *draw.sample(others, 2)], 3)
    return {"prompt": prompt, "choices": tuple(choices), "label": label, "raw": True}


MAKERS: dict[str, tuple[Callable[[Draw], Fields], ...]] = {
    "arithmetic": (_apples, _eggs, _tickets, _plus_minus),
    "classification": (_review, _topic),
    "extraction": (_invoice, _parcel, _meeting),
    "instructions": (_capitals, _repeat, _list, _begin, _comma),
    "json": (_person, _journey, _price),
    "termination": (_opposite, _one, _after, _diet),
    "tool calls": (_call,),
    **{f"retrieval at {depth} %": (_buried(depth / 100),) for depth in (10, 50, 90)},
    **{language.name: (_said_in(language),) for language in LANGUAGES},
}
