"""The tables of lilliput.suites.templates. Russian says a day or month after "после" in the genitive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

NAMES = ("Anna", "Tom", "Elena", "Raj", "Maria", "Lee", "Omar", "Ines", "Paul", "Yuki", "Nina", "David")
CITIES = ("Hamburg", "Vienna", "Paris", "Lyon", "Oslo", "Madrid", "Rome", "Prague", "Dublin", "Lisbon")
FIRMS = ("Harbour Foods", "North Paper", "Green Energy", "City Books", "Alpine Tools", "River Bank")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
HOURS = ("9:30", "10:15", "11:45", "14:20", "15:30", "16:50", "18:10")
MONTHS = ("January", "February", "March", "April", "June", "July", "August", "September", "October", "November")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown")
THINGS = ("door", "lamp", "book", "boat", "box", "chair", "phone", "bag", "clock", "bicycle")
ANIMALS = ("cow", "cat", "horse", "rabbit", "bird", "shark", "goat", "bear", "duck", "mouse")
KINDS = ("planet", "fruit", "river", "colour", "tree", "vegetable", "flower", "country", "fish", "tool")
PLURALS = ("fruits", "rivers", "colours", "trees", "vegetables", "flowers", "countries", "tools", "animals", "cities")
NUMBERS = ("three", "five", "seven", "nine", "eleven", "fourteen", "sixteen", "nineteen", "twenty")
OPPOSITES = ("cold", "big", "fast", "dark", "happy", "old", "wet", "loud", "heavy", "open", "early", "strong")
WORDS = (
    "water", "garden", "window", "bread", "summer", "music", "paper", "river", "silver", "orange", "table", "cloud",
)  # fmt: skip
SENTENCES = (
    "The {colour} {thing} stands by the window",
    "Nobody saw the {colour} {thing} yesterday",
    "My sister sold her {colour} {thing}",
)
REVIEW = """\
Review: I enjoyed every minute.
Sentiment: positive

Review: A terrible waste of time.
Sentiment: negative

Review: {}
Sentiment:"""
TOPIC = """\
Sentence: The runner broke the record.
Topic: sport

Sentence: The mayor lost the vote.
Topic: politics

Sentence: The cell divides in two.
Topic: science

Sentence: {}
Topic:"""
ADJECTIVES = {
    "positive": ("wonderful", "very good", "beautiful", "excellent", "a joy to use", "perfect"),
    "negative": ("terrible", "very bad", "ugly", "useless", "a waste of money", "broken"),
}
TOPICS = {
    "sport": (
        "The goalkeeper saved a penalty.", "The team won in extra time.", "She ran the marathon in three hours.",
        "The coach praised his players.", "He scored from the halfway line.", "The champion lost the second set.",
    ),
    "politics": (
        "The president signed the treaty.", "Voters will elect a new mayor.", "The senate rejected the bill.",
        "The opposition called for a debate.", "The government raised taxes.", "The ambassador met the prime minister.",
    ),
    "science": (
        "The physicists found a new particle.", "The experiment measured the speed of light.",
        "Biologists discovered a new kind of bacteria.", "The probe took pictures of a comet.",
        "The laboratory tested a new vaccine.", "Astronomers observed a distant galaxy.",
    ),
}  # fmt: skip
ACTIONS = (  # a function, its argument, and what a user says
    ("get_weather", "city", "What is the weather in {city}?"),
    ("call", "person", "Please phone {name}."),
    ("turn_on", "device", "Switch on the {thing}, please."),
    ("search", "query", "Find a cheap {thing}."),
    ("book_train", "city", "I want to go to {city} by train."),
    ("translate", "text", "What is the word {thing} in French?"),
)


class Word(NamedTuple):
    """As it stands alone, and after the word for "after"."""

    nominative: str
    genitive: str


@dataclass(frozen=True)
class Language:
    """Beginnings of sentences, with a country, a day or a month put in."""

    name: str
    capital: str
    after_day: str
    days: tuple[Word, ...]
    after_month: str
    months: tuple[Word, ...]


def _alike(words: str) -> tuple[Word, ...]:
    return tuple(Word(word, word) for word in words.split())


def _both(nominatives: str, genitives: str) -> tuple[Word, ...]:
    return tuple(map(Word, nominatives.split(), genitives.split()))


LANGUAGES = (
    Language(
        "German", "Die Hauptstadt von {} ist",
        "Nach {} kommt", _alike("Montag Dienstag Mittwoch Donnerstag Freitag Samstag Sonntag"),
        "Nach dem {} kommt der",
        _alike("Januar Februar März April Mai Juni Juli August September Oktober November Dezember"),
    ),
    Language(
        "French", "La capitale {} est",
        "Après {} vient", _alike("lundi mardi mercredi jeudi vendredi samedi dimanche"),
        "Après {} vient",
        _alike("janvier février mars avril mai juin juillet août septembre octobre novembre décembre"),
    ),
    Language(
        "Spanish", "La capital de {} es",
        "Después del {} viene el", _alike("lunes martes miércoles jueves viernes sábado domingo"),
        "Después de {} viene",
        _alike("enero febrero marzo abril mayo junio julio agosto septiembre octubre noviembre diciembre"),
    ),
    Language(
        "Russian", "Столица {} —",
        "После {} идёт",
        _both("понедельник вторник среда четверг пятница суббота воскресенье",
              "понедельника вторника среды четверга пятницы субботы воскресенья"),
        "После {} идёт",
        _both("январь февраль март апрель май июнь июль август сентябрь октябрь ноябрь декабрь",
              "января февраля марта апреля мая июня июля августа сентября октября ноября декабря"),
    ),
    Language(
        "Chinese", "{}的首都是",
        "{}之后是", _alike("星期一 星期二 星期三 星期四 星期五 星期六 星期日"),
        "{}之后是", _alike("一月 二月 三月 四月 五月 六月 七月 八月 九月 十月 十一月 十二月"),
    ),
    Language(
        "Arabic", "عاصمة {} هي",
        "بعد يوم {} يأتي يوم", _alike("الاثنين الثلاثاء الأربعاء الخميس الجمعة السبت الأحد"),
        "بعد شهر {} يأتي شهر",
        _alike("يناير فبراير مارس أبريل مايو يونيو يوليو أغسطس سبتمبر أكتوبر نوفمبر ديسمبر"),
    ),
)  # fmt: skip

CAPITALS = {
    "German": (
        ("Frankreich", "Paris"), ("Italien", "Rom"), ("Spanien", "Madrid"), ("Deutschland", "Berlin"),
        ("Russland", "Moskau"), ("China", "Peking"), ("Ägypten", "Kairo"), ("Japan", "Tokio"),
        ("Griechenland", "Athen"), ("Portugal", "Lissabon"),
    ),
    "French": (
        ("de la France", "Paris"), ("de l'Italie", "Rome"), ("de l'Espagne", "Madrid"), ("de l'Allemagne", "Berlin"),
        ("de la Russie", "Moscou"), ("de la Chine", "Pékin"), ("de l'Égypte", "Le Caire"), ("du Japon", "Tokyo"),
        ("de la Grèce", "Athènes"), ("du Portugal", "Lisbonne"),
    ),
    "Spanish": (
        ("Francia", "París"), ("Italia", "Roma"), ("España", "Madrid"), ("Alemania", "Berlín"), ("Rusia", "Moscú"),
        ("China", "Pekín"), ("Egipto", "El Cairo"), ("Japón", "Tokio"), ("Grecia", "Atenas"), ("Portugal", "Lisboa"),
    ),
    "Russian": (
        ("Франции", "Париж"), ("Италии", "Рим"), ("Испании", "Мадрид"), ("Германии", "Берлин"), ("России", "Москва"),
        ("Китая", "Пекин"), ("Египта", "Каир"), ("Японии", "Токио"), ("Греции", "Афины"), ("Португалии", "Лиссабон"),
    ),
    "Chinese": (
        ("法国", "巴黎"), ("意大利", "罗马"), ("西班牙", "马德里"), ("德国", "柏林"), ("俄罗斯", "莫斯科"),
        ("中国", "北京"), ("埃及", "开罗"), ("日本", "东京"), ("希腊", "雅典"), ("葡萄牙", "里斯本"),
    ),
    "Arabic": (
        ("فرنسا", "باريس"), ("إيطاليا", "روما"), ("إسبانيا", "مدريد"), ("ألمانيا", "برلين"), ("روسيا", "موسكو"),
        ("الصين", "بكين"), ("مصر", "القاهرة"), ("اليابان", "طوكيو"), ("اليونان", "أثينا"), ("البرتغال", "لشبونة"),
    ),
}  # fmt: skip
