"""The ladder of losses of any model file, ours or not: which rung lost what, and where a rung that is off begins to be.

    lilliput ladder FILE --source MODEL

Rungs are those of lilliput.file_ladder.found; each runs the same tokens, and its step is the mean Kullback-Leibler
divergence (nats a token) of its next-token distributions from those of the rung before. Of a step beyond the limit
the first layer and operator is found: against the decoder in torch for the rung `graph`
(lilliput.file_ladder.locate), tensor by tensor of the same graph for those behind it.

Runs are in child processes. A rung that cannot be computed says why, and the next one's step counts from the last that
was.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from lilliput.checks import DAMAGES, opened
from lilliput.checks.base import NotCheckedError
from lilliput.checks.comparison import Source
from lilliput.errors import ArtifactError, InputError, LilliputError
from lilliput.file_ladder.found import FileLadder, FileRung, RungName
from lilliput.file_ladder.locate import GraphOrder, first_of_decoder, first_of_two
from lilliput.file_ladder.values import decoder_values
from lilliput.file_ladder.weights import Held, held
from lilliput.grid import Float
from lilliput.model import DecoderConfig
from lilliput.progress import Progress, silent
from targets import machine
from targets.metrics import divergence, log_softmax

LIMIT = 1e-3  # nats a token
LOCATED = 16  # tokens of the run that finds a place: every tensor of it is kept


class FileOnLadder(Protocol):
    """A file of one format: its graph, and runs of it as each rung."""

    format: str

    @property
    def rungs(self) -> tuple[RungName, ...]:
        """Behind `weights`, in their order."""
        ...

    @property
    def order(self) -> GraphOrder: ...

    def note(self, rung: RungName) -> str:
        """What is to be said of a rung."""
        ...

    def fitted(self, tokens: Sequence[int]) -> list[int]:
        """As many of the tokens as one run takes."""
        ...

    def seen_with(self, tokens: Sequence[int]) -> list[int]:
        """What `values` runs of the tokens."""
        ...

    def logits(self, rung: RungName, tokens: Sequence[int]) -> Float:
        """(n, vocab) of the last n positions."""
        ...

    def values(self, rung: RungName, tokens: Sequence[int]) -> dict[str, Float]:
        """Every tensor that can be seen of one call over the tokens."""
        ...


def text(source: Source, tokens: int) -> list[int]:
    """The first token ids of the evaluation's text, by the source's tokenizer."""
    from lilliput.texts import evaluation_text
    from lilliput.tokenizer_folder import load_tokenizer

    ids = load_tokenizer(source.tokenizer).encode(evaluation_text()[: 40 * tokens], add_special_tokens=True)
    return [int(i) for i in ids[:tokens]]


def climb(
    path: Path,
    source: Source,
    tokens: Sequence[int],
    limit: float = LIMIT,
    processor: str | None = None,
    progress: Progress = silent,
) -> FileLadder:
    """The ladder of a file. `processor`: one that qemu emulates (Haswell, arm://cortex-a76), of a .onnx file alone.

    Raises ArtifactError where the file cannot be opened, or does not hold the source's decoder; InputError where its
    inputs are unknown; MissingError where the emulator is not installed.
    """
    with opened(path, source) as file, tempfile.TemporaryDirectory(prefix="lilliput-ladder-") as folder:
        try:
            numbers = held(file, source)
        except NotCheckedError as error:
            raise ArtifactError(f"{path}: its weights cannot be read ({error})") from error
        except DAMAGES as error:
            what = f"{type(error).__name__}: {error}"
            raise ArtifactError(f"{path}: is damaged, or unlike what is known ({what}): export it again") from error
        on = _on_ladder(file.format, file.path, numbers, Path(folder), processor)
        tokens = on.fitted(tokens)
        rungs = _rungs(on, numbers, source, tokens, limit, progress)
        return FileLadder(
            path=str(path),
            format=on.format,
            source=source.name,
            runtime=", ".join(f"{n} {v}" for n, v in file.runtime_versions.items() if n in RUNTIMES[on.format]),
            processor=f"{processor}, emulated by qemu" if processor else machine.describe("host://").cpu,
            tokens=len(tokens),
            limit=limit,
            rungs=tuple(rungs),
            notes=numbers.notes,
        )


_FIRST: tuple[RungName, ...] = ("float", "weights")
RUNTIMES = {"onnx": ("onnxruntime",), "tflite": ("ai-edge-litert",), "gguf": ("llama-cpp-python",)}


def _on_ladder(kind: str, path: Path, numbers: Held, scratch: Path, processor: str | None) -> FileOnLadder:
    if kind == "onnx":
        from lilliput.file_ladder.emulated import python
        from lilliput.file_ladder.onnx_graph import OnnxLadder

        return OnnxLadder(path, numbers.tensors, scratch, python(processor) if processor else ())
    if processor:
        raise InputError(f"{path}: processor {processor!r} is emulated for .onnx files alone")
    if kind == "tflite":
        from lilliput.file_ladder.tflite_graph import TfliteLadder

        return TfliteLadder(path, numbers.tensors, scratch)
    if kind == "gguf":
        from lilliput.file_ladder.gguf_graph import GgufLadder

        return GgufLadder(path, numbers.tensors, scratch)
    raise InputError(f"{path}: a ladder is made of .onnx, .tflite, .litertlm and .gguf files, which run")


def _rungs(
    on: FileOnLadder, numbers: Held, source: Source, tokens: Sequence[int], limit: float, progress: Progress
) -> list[FileRung]:
    steps, missing = _runs(on, numbers, source, tokens, progress)
    rows = min(len(logits) for logits in steps.values())  # a runtime may give the last positions alone
    last = {name: logits[-rows:] for name, logits in steps.items()}
    found, before = list[FileRung](), _FIRST[0]
    for name in (*_FIRST, *on.rungs):
        if name in missing:
            found.append(FileRung(rung=name, mean_kld=None, step_kld=None, flips=None, note=missing[name]))
            continue
        rung = _rung(name, last[name], last[before], last["float"], limit)
        if name == "weights":
            rung = rung.model_copy(update={"off": False, "place": numbers.furthest(source)})
        elif name in on.rungs:
            rung = rung.model_copy(update={"note": on.note(name)})
        found.append(_located(rung, on, numbers, before, tokens) if rung.off else rung)
        before = name
    return found


def _runs(
    on: FileOnLadder, numbers: Held, source: Source, tokens: Sequence[int], progress: Progress
) -> tuple[dict[RungName, Float], dict[RungName, str]]:
    """Logits (n, vocab) of every rung, or why there are none."""
    total, missing = 2 + len(on.rungs), dict[RungName, str]()
    found: dict[RungName, Float] = {
        "float": _decoder_logits(source.config, source.weights, tokens),
        "weights": _decoder_logits(numbers.config, numbers.weights, tokens),
    }
    for i, name in enumerate(on.rungs):
        progress(2 + i, total)
        try:
            found[name] = on.logits(name, tokens)
        except LilliputError as error:
            missing[name] = str(error)
    progress(total, total)
    return found, missing


def _decoder_logits(config: DecoderConfig, weights: Mapping[str, Float], tokens: Sequence[int]) -> Float:
    return decoder_values(config, weights, tokens)["head"]


def _rung(name: RungName, logits: Float, before: Float, of_float: Float, limit: float) -> FileRung:
    """A rung's figures. Logits that are not finite are off, without a figure."""
    if not np.isfinite(logits).all():
        return FileRung(rung=name, mean_kld=None, step_kld=None, flips=None, off=True, note="logits are not all finite")
    if name == "float":
        return FileRung(rung=name, mean_kld=0.0, step_kld=None, flips=None)
    step, flips = _divergence(before, logits)
    whole, _ = _divergence(of_float, logits)
    return FileRung(rung=name, mean_kld=whole, step_kld=step, flips=flips, off=step > limit)


def _divergence(wanted: Float, seen: Float) -> tuple[float, float]:
    """Mean KLD, and the share of positions whose likeliest token is another."""
    if wanted.shape != seen.shape:
        raise ArtifactError(f"the file's logits are {seen.shape}, wanted {wanted.shape}: it is of another model")
    pairs = [(log_softmax(a, "the rung before"), log_softmax(b, "the rung")) for a, b in zip(wanted, seen, strict=True)]
    return float(np.mean([divergence(p, q) for p, q in pairs])), float((wanted.argmax(1) != seen.argmax(1)).mean())


def _located(
    rung: FileRung, on: FileOnLadder, numbers: Held, before: RungName, tokens: Sequence[int]
) -> FileRung:  # fmt: skip
    """With the first place that diverges from the rung before."""
    few = on.seen_with(tokens[:LOCATED])
    try:
        seen = on.values(rung.rung, few)
        if before == "weights":
            place = first_of_decoder(on.order, seen, decoder_values(numbers.config, numbers.weights, few))
        else:
            place = first_of_two(on.order, seen, on.values(before, few))
    except LilliputError as error:
        return rung.model_copy(update={"unseen": str(error)})
    unseen = (
        "" if place else f"no tensor of one call over {len(few)} tokens differs: it is in what follows, or in fusions"
    )
    return rung.model_copy(update={"place": place, "unseen": unseen})
