"""Calibration samples: token sequences of one length, from text or from the model itself.

    self              sampled from the float model (calibration.generation): needs no data
    builtin           the first part of Python's own language reference (lilliput.texts)
    docstrings        those of Python's standard library (likewise)
    dataset:ID        a dataset of the hub or a local path, by the package `datasets`
    PATH.jsonl        one JSON object a line: `text`, or `messages` for the chat template
    PATH              any other file is one UTF-8 text

A list of {samples, count} is a mix: each part is gathered by itself, and they follow one another. The order of
samples does not matter to statistics, which are sums over all tokens.

Text is tokenized once and cut into sequences of `length`; `count` of them are taken at even distances.
Sequences never cross the end of a text silently: texts are joined by the end-of-text token, as in training.

    samples.safetensors   tokens (count, length) int32
    samples.json          provenance
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field
from safetensors.numpy import load_file, save_file

from lilliput import texts
from lilliput.errors import CalibrationError, MissingPackageError
from lilliput.model import SourceModel
from lilliput.progress import Progress, silent
from lilliput.recipe_schema import SamplePart
from lilliput.tokenizer_folder import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from calibration.generation import Sampling

Tokens = npt.NDArray[np.int32]

DATASET = "dataset:"


class SampleOptions(BaseModel):
    """Where samples come from, how many, how long."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    samples: str | tuple[SamplePart, ...] = "self"
    count: int = Field(default=48, ge=1)
    length: int = Field(default=512, ge=2)  # tokens
    seed: int = 0
    temperature: float = Field(default=1.0, gt=0)  # of self-generated samples
    top_k: int = Field(default=0, ge=0)  # likewise; 0 draws from the whole vocabulary
    split: str = "train"  # of a dataset
    field: str = "text"  # of a dataset or JSONL file

    @property
    def text(self) -> str:
        """The name of a single source."""
        assert isinstance(self.samples, str), "a mix has no single text"
        return self.samples

    def parts(self) -> tuple[SampleOptions, ...]:
        """A mix as options of single sources; parts that the model writes get seeds of their own."""
        if isinstance(self.samples, str):
            return (self,)
        return tuple(
            self.model_copy(update={**part.model_dump(exclude_none=True), "seed": self.seed + index})
            for index, part in enumerate(self.samples)
        )


@dataclass(frozen=True)
class Provenance:
    """What samples are, as reports and checkpoints record it."""

    kind: str  # self, builtin, docstrings, text, jsonl, dataset or mix
    description: str
    sha256: str  # of the text, of the tokens where the model wrote them, or of a mix's parts' sha256
    count: int
    length: int  # tokens

    @property
    def tokens(self) -> int:
        return self.count * self.length


@dataclass(frozen=True, eq=False)
class Samples:
    tokens: Tokens  # (count, length) int32
    provenance: Provenance


def gather(source: SourceModel, options: SampleOptions, progress: Progress = silent) -> Samples:
    """The samples that the options ask for.

    Raises CalibrationError where a text cannot be read or is too short, MissingPackageError without `datasets`.
    """
    if options.length > source.config.max_positions:
        raise CalibrationError(
            f"calibration length is {options.length}, {source.name} has {source.config.max_positions} positions: "
            "shorten calibration.length"
        )
    if not isinstance(options.samples, str):
        return _mixed([gather(source, part, progress) for part in options.parts()])
    if options.samples == "self":
        return _generated(source, options, progress)
    tokenizer = load_tokenizer(source.tokenizer)
    kind, documents = _documents(tokenizer, options)
    digest = hashlib.sha256()
    ids: list[int] = []
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for document in documents:
        digest.update(document.encode())
        ids += ([*end] if ids else []) + tokenizer.encode(document, add_special_tokens=False, verbose=False)
    tokens = cut(ids, options, _prefix(tokenizer))
    provenance = Provenance(kind, options.text, digest.hexdigest(), *tokens.shape)
    return Samples(tokens, provenance)


def _mixed(parts: Sequence[Samples]) -> Samples:
    """The parts' samples one after the other."""
    tokens = np.concatenate([part.tokens for part in parts])
    found = [part.provenance for part in parts]
    digest = hashlib.sha256(" ".join(p.sha256 for p in found).encode()).hexdigest()
    description = " + ".join(f"{p.count} x {p.description}" for p in found)
    return Samples(tokens, Provenance("mix", description, digest, *tokens.shape))


def cut(ids: list[int], options: SampleOptions, prefix: list[int]) -> Tokens:
    """`count` sequences at even distances, each with the tokenizer's own prefix (a start token) in front."""
    length = options.length - len(prefix)
    wanted = options.count * length
    if len(ids) < wanted:
        raise CalibrationError(
            f"calibration samples {options.samples!r} have {len(ids)} tokens, wanted {wanted} "
            f"({options.count} sequences of {length}): give a longer text, or lower calibration.count or .length"
        )
    starts = np.linspace(0, len(ids) - length, options.count).astype(int)
    return np.array([prefix + ids[s : s + length] for s in starts], dtype=np.int32)


def _prefix(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts in front of a text."""
    plain, full = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    starts = [i for i in range(len(full)) if full[i : i + len(plain)] == plain]
    return list(full[: starts[0]]) if starts else []


def _generated(source: SourceModel, options: SampleOptions, progress: Progress) -> Samples:
    from calibration.generation import generate
    from lilliput.decoder import build

    sampling = _sampling(source, options)  # the tokenizer is gone before the weights come
    tokens = generate(build(source), sampling, progress)
    text = f"sampled from {source.name}: seed {options.seed}, temperature {options.temperature}, top_k {options.top_k}"
    digest = hashlib.sha256(tokens.astype("<i4").tobytes()).hexdigest()
    return Samples(tokens, Provenance("self", text, digest, *tokens.shape))


def _sampling(source: SourceModel, options: SampleOptions) -> Sampling:
    from calibration.generation import Sampling

    tokenizer = load_tokenizer(source.tokenizer)
    return Sampling(
        count=options.count,
        length=options.length,
        seed=options.seed,
        temperature=options.temperature,
        top_k=options.top_k,
        first_tokens=tuple(_prefix(tokenizer)),
        banned=tuple(tokenizer.all_special_ids),
    )


def _documents(tokenizer: PreTrainedTokenizerBase, options: SampleOptions) -> tuple[str, Iterable[str]]:
    """The kind of the samples and their texts."""
    if options.text in texts.CALIBRATION_TEXTS:
        return options.text, [texts.calibration_text(options.text)]
    if options.text.startswith(DATASET):
        return "dataset", _dataset(tokenizer, options)
    path = Path(options.text)
    if not path.is_file():
        raise CalibrationError(
            f"calibration samples {options.samples!r}: no such file; wanted self, builtin, docstrings, "
            "dataset:<id or path>, a text file or a .jsonl file"
        )
    return ("jsonl", _jsonl(tokenizer, path, options.field)) if path.suffix == ".jsonl" else ("text", [_text(path)])


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"calibration text {path} is not readable as UTF-8 ({error})") from error
    if not text.strip():
        raise CalibrationError(f"calibration text {path} is empty: wanted at least one sequence of text")
    return text


def _jsonl(tokenizer: PreTrainedTokenizerBase, path: Path, field: str) -> Iterator[str]:
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise CalibrationError(f"calibration samples {path} line {number}: not JSON ({error})") from error
            yield _row_text(tokenizer, row, field, f"{path} line {number}")


def _row_text(tokenizer: PreTrainedTokenizerBase, row: Any, field: str, where: str) -> str:
    """A row's text, or its conversation through the chat template."""
    if isinstance(row, dict) and isinstance(row.get(field), str):
        return str(row[field])
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        return str(tokenizer.apply_chat_template(row["messages"], tokenize=False))
    seen = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
    raise CalibrationError(f"calibration samples {where}: has {seen}; wanted a text under {field!r}, or messages")


def _dataset(tokenizer: PreTrainedTokenizerBase, options: SampleOptions) -> Iterator[str]:
    """Rows until the texts surely suffice (four characters a token is the usual measure; eight are read)."""
    try:
        import datasets
    except ImportError as error:
        raise MissingPackageError("datasets", "data", "calibration samples from a dataset") from error
    name = options.text.removeprefix(DATASET)
    try:
        rows = datasets.load_dataset(name, split=options.split, streaming=True)
    except Exception as error:  # datasets raises many kinds
        raise CalibrationError(f"calibration dataset {name!r} cannot be opened ({error})") from error
    characters, enough = 0, 8 * options.count * options.length
    for number, row in enumerate(rows):
        text = _row_text(tokenizer, row, options.field, f"{options.samples} row {number}")
        yield text
        characters += len(text)
        if characters > enough:
            return


def save(samples: Samples, folder: Path) -> None:
    """Write samples into `folder` (made if absent)."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"tokens": samples.tokens}, folder / "samples.safetensors")
    (folder / "samples.json").write_text(json.dumps(asdict(samples.provenance), indent=2, sort_keys=True) + "\n")


def load(folder: Path) -> Samples:
    """Read what `save` wrote."""
    text = json.loads((folder / "samples.json").read_text())
    return Samples(load_file(folder / "samples.safetensors")["tokens"], Provenance(**text))
