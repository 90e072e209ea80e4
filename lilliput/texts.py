"""Texts that every Python has. They serve where the user gives none.

    builtin       the language reference in `pydoc_data.topics`, about 465,000 characters: calibration and evaluation
                  take parts of it that do not touch, so that what is measured was never calibrated on
    docstrings    docstrings of the standard library, in the order of their sources: English with examples of code, by
                  other authors than the reference. For evaluation those of six modules, about 46,000 characters; for
                  calibration those of all others that are no packages' parts, about 830,000

Both change with Python's version: a text's sha256 goes into what is recorded.
"""

from __future__ import annotations

import ast
import hashlib
import sys
from functools import cache
from importlib.util import find_spec

from lilliput.errors import MissingError

CALIBRATION = slice(0, 200_000)  # characters
EVALUATION = slice(300_000, 345_000)
CALIBRATION_TEXTS = ("builtin", "docstrings")
DOCUMENTED = ("fractions", "functools", "heapq", "random", "statistics", "textwrap")
EVALUATION_TEXTS = {
    "builtin": f"Python's pydoc_data.topics, characters {EVALUATION.start} to {EVALUATION.stop}",
    "docstrings": f"docstrings of Python's modules {', '.join(DOCUMENTED)}",
}


@cache
def builtin_text() -> str:
    """The topics' texts in the order of their names, an empty line between two."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


@cache
def docstrings_text() -> str:
    """The docstrings of DOCUMENTED, an empty line between two. The modules are read, not imported."""
    return "\n\n".join(text for module in DOCUMENTED for text in docstrings(_source(module)))


@cache
def other_docstrings_text() -> str:
    """The docstrings of the library's other public modules that have sources, by their names."""
    names = sorted(name for name in sys.stdlib_module_names if name[0] != "_" and name not in DOCUMENTED)
    sources = [source for name in names if (source := _found(name)) is not None]
    return "\n\n".join(text for source in sources for text in docstrings(source))


def _source(module: str) -> str:
    source = _found(module)
    if source is None:
        raise MissingError(f"text docstrings: this Python has no source of its module {module!r}: use another text")
    return source


def _found(module: str) -> str | None:
    """The module's source; None where it has none, or this Python lacks the module."""
    spec = find_spec(module)
    loader = spec.loader if spec else None
    source = loader.get_source(module) if loader is not None and hasattr(loader, "get_source") else None
    return None if source is None else str(source)


def docstrings(source: str) -> list[str]:
    """Those of a module, its classes and its functions, as they stand one after the other."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    documented = [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]
    documented.sort(key=lambda node: getattr(node, "lineno", 0))
    return [text for node in documented if (text := ast.get_docstring(node))]


def calibration_text(name: str = "builtin") -> str:
    """The text that is called so in CALIBRATION_TEXTS."""
    return other_docstrings_text() if name == "docstrings" else builtin_text()[CALIBRATION]


def evaluation_text(name: str = "builtin") -> str:
    """The text that is called so in EVALUATION_TEXTS."""
    return docstrings_text() if name == "docstrings" else builtin_text()[EVALUATION]


def text_sha256(text: str) -> str:
    """Hex digest of a text's UTF-8 bytes."""
    return hashlib.sha256(text.encode()).hexdigest()
