"""The truth-check: what is wrong with a model file, ours or anyone's, found by reading it.

    lilliput inspect FILE_OR_FOLDER --check [--source MODEL]

Each rule (lilliput/checks/rules, a module for each family of rules; the folder is the registry) looks at the opened
file and names the place of what is wrong, with a public reference and a fix. Rules that need the float model are asked
where a source is given: its weights are compared tensor by tensor (lilliput.checks.comparison), its tokenizer by token
ids. Nothing is run on the model's runtime, but llama.cpp's tokenizer for a GGUF file's.

Nothing of the exporters is used: who writes a file does not judge it.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import struct
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from lilliput import inspection, manifest
from lilliput.checks import rules
from lilliput.checks.base import Checked, Finding, Format, NotCheckedError, Rule, finding
from lilliput.checks.comparison import Source, identify
from lilliput.checks.opened import Fact, Opened, split_rows
from lilliput.errors import ArtifactError
from lilliput.inspection import Inspection
from lilliput.model import SourceModel

__all__ = ["Checked", "Finding", "Rule", "check", "known", "open_source", "source_of"]

FORMATS: dict[str, Format] = {
    ".gguf": "gguf",
    ".onnx": "onnx",
    ".tflite": "tflite",
    ".litertlm": "tflite",
    ".safetensors": "safetensors",
}
# what readers raise where a file's tables lead nowhere, or hold what they never did
DAMAGES = (struct.error, ValueError, KeyError, IndexError, TypeError, AttributeError, StopIteration)
RUNTIME_PACKAGES = ("onnxruntime", "ai-edge-litert", "llama-cpp-python")
QUANTIZED_NAME = re.compile(
    r"(?:^|[^a-z0-9])(int[248]|[wq][248](?:[_-][k01]\w*)?|iq\d\w*|quant(?:ized)?)(?:[^a-z0-9]|$)"
)
SAID = 300  # characters of what was seen that are kept


@cache
def known() -> tuple[Rule, ...]:
    """Every rule, by id."""
    modules = (importlib.import_module(f"{rules.__name__}.{m.name}") for m in pkgutil.iter_modules(rules.__path__))
    return tuple(sorted((rule for module in modules for rule in module.RULES), key=lambda rule: rule.id))


def check(path: Path, source: Source | None = None, *, gpu: bool = False) -> Checked:
    """Ask every rule that fits the file's format; `gpu`: notes are errors, as the file is meant for a GPU.

    Raises ArtifactError for a file that cannot be opened.
    """
    with opened(path, source) as file:
        asked = [r for r in known() if file.format in r.formats and (r.needs == "file" or source is not None)]
        found, skipped = list[Finding](), list[str]()
        for rule in asked:
            try:
                for seen in rule.check(file):
                    found.append(_short(finding(rule, seen)))
            except NotCheckedError as error:
                skipped.append(f"{rule.id}: {error}")
            except DAMAGES as error:
                skipped.append(
                    f"{rule.id}: the file is damaged, or unlike what is known ({type(error).__name__}: {error})"
                )
        if gpu:
            found = [f.model_copy(update={"severity": "error"}) if f.severity == "note" else f for f in found]
        return Checked(
            path=str(path),
            format=file.format,
            findings=tuple(sorted((f for f in found if f.severity != "note"), key=lambda f: f.severity)),
            rules=tuple(rule.id for rule in asked),
            not_checked=tuple(skipped),
            notes=tuple(f for f in found if f.severity == "note"),
        )


def _short(found: Finding) -> Finding:
    seen = " ".join(found.seen.split())
    return found.model_copy(update={"seen": seen if len(seen) <= SAID else f"{seen[:SAID]}…"})


@contextmanager
def opened(path: Path, source: Source | None = None) -> Iterator[Opened]:
    """The file as rules see it, and what lies beside it, while the context lasts."""
    found = inspection.inspect(path)
    file = inspection.model_files(path)[0]
    if file.suffix not in FORMATS:
        raise ArtifactError(f"{file}: {file.suffix} is no format that can be checked, wanted {', '.join(FORMATS)}")
    with ExitStack() as stack:
        yield _OPENERS[FORMATS[file.suffix]](path, file, found, source, stack)


def _gguf(path: Path, file: Path, found: Inspection, source: Source | None, stack: ExitStack) -> Opened:
    from lilliput.checks import gguf_view as view

    read = view.open_file(inspection.parts(file))
    held = view.tensors(read, found.tensors)
    return Opened(
        path=file,
        format="gguf",
        tensors=held,
        facts=view.facts(read),
        parameters=partial(view.parameters, read, held),
        text=view.text(read),
        claimed=view.claimed(read) or _claimed(path, file),
        gguf_file=read,
        against=source,
        changes=found.changes,
        runtime_versions=_versions(),
    )


def _onnx(path: Path, file: Path, found: Inspection, source: Source | None, stack: ExitStack) -> Opened:
    import onnx

    from lilliput.checks import onnx_view as view
    from lilliput.checks.text_view import beside

    read = view.OnnxFile(file, onnx.load(file, load_external_data=False))
    held = view.tensors(read, found.tensors)
    named = any(tensor.parts for tensor in held)
    return Opened(
        path=file,
        format="onnx",
        tensors=held,
        facts=view.facts(read),
        parameters=partial(split_rows, held) if named or source is None else partial(identify, held, source),
        text=beside(file.parent),
        claimed=_claimed(path, file),
        onnx_file=read,
        against=source,
        changes=found.changes,
        runtime_versions=_versions(),
    )


def _tflite(path: Path, file: Path, found: Inspection, source: Source | None, stack: ExitStack) -> Opened:
    from lilliput.checks import tflite_view as view
    from lilliput.checks.text_view import beside, in_bundle

    read = view.open_file(file)
    held = view.tensors(read, found.tensors)
    named = any(tensor.parts for tensor in held)
    bundle = file if file.suffix == ".litertlm" else file.with_name("bundle.litertlm")
    return Opened(
        path=file,
        format="tflite",
        tensors=held,
        facts=view.facts(read),
        parameters=partial(split_rows, held) if named or source is None else partial(identify, held, source),
        text=stack.enter_context(in_bundle(bundle)) or beside(file.parent),
        claimed=_claimed(path, file),
        tflite_file=read,
        against=source,
        changes=found.changes,
        runtime_versions=_versions(),
    )


def _safetensors(path: Path, file: Path, found: Inspection, source: Source | None, stack: ExitStack) -> Opened:
    from lilliput.checks.safetensors_view import tensors

    held = tensors(inspection.model_files(path), found.tensors)
    return Opened(file, "safetensors", held, {}, partial(split_rows, held), against=source, changes=found.changes)


_OPENERS = {"gguf": _gguf, "onnx": _onnx, "tflite": _tflite, "safetensors": _safetensors}


def _claimed(path: Path, file: Path) -> Fact | None:
    """What the manifest's largest class of tensors, or else the file's name, says of its weights."""
    if path.is_dir() and (path / manifest.NAME).is_file():
        classes = [c for c in manifest.read(path).tensors if not c.targets or manifest.read(path).target in c.targets]
        largest = max(classes, key=lambda c: c.weights, default=None)
        if largest is not None and largest.solver is not None:
            return Fact(largest.grid, manifest.NAME)
    match = QUANTIZED_NAME.search(file.stem.lower())
    return Fact(match[1], f"the name {file.name}") if match else None


def _versions() -> dict[str, str]:
    found = {}
    for package in RUNTIME_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def source_of(model: SourceModel) -> Source:
    """A source that is open already."""
    return Source(model.name, model.config, model.weights, model.tokenizer)


@contextmanager
def open_source(name: str) -> Iterator[Source]:
    """What `--source` names: a Hugging Face folder, a .gguf file, package:NAME/FILE, a hub id.

    It is read into a temporary folder, so that any of its tensors can be had. Raises SourceError.
    """
    from lilliput.source import load

    with tempfile.TemporaryDirectory(prefix="lilliput-source-") as folder:
        yield source_of(load(name, Path(folder) / "source", proof=False))
