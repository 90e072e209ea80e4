"""The source stage's result: one folder with the model in the decoder's own terms.

    weights.safetensors   float32, decoder names; written parameter by parameter, so one is in memory at a time
    codes.safetensors     codes, scales and offsets of matrices that the source holds on a grid (lilliput.checkpoint)
    config.json           DecoderConfig
    tokenizer/            what AutoTokenizer opens, and generation_config.json
    source.json           name, origin, license, sha256 of the files read, the two proofs; of a quantized source the
                          grid of each matrix, and why others that it quantizes have none

safetensors is: uint64 length of the header, the header (JSON: dtype, shape, byte range of each tensor),
then the data. Ranges follow sorted names, so the same weights give the same bytes in whatever order they come.
Shapes are checked on arrays without numbers before anything is written.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from lilliput.artifact import sha256
from lilliput.checkpoint import Codes, save_codes
from lilliput.errors import SourceError
from lilliput.families import Read
from lilliput.grid import Float, QuantizedTensor
from lilliput.model import DecoderConfig, SourceModel, Weights
from lilliput.progress import Progress
from lilliput.sources import Original
from lilliput.sources.codes import Held, held
from lilliput.sources.stored import Stored

FLOAT32_BYTES = 4
EMPTY = np.empty((0, 0), np.float32)  # values that are written already


def check_shapes(original: Original) -> None:
    """Raise SourceError unless the checkpoint holds every parameter in its shape, and no tensor besides."""
    last = ""
    read_names: set[str] = set()

    def empty(name: str) -> Float:
        nonlocal last
        last = name
        read_names.add(name)
        return np.broadcast_to(np.float32(0), _stored_shape(original, name))

    wanted = original.config.parameter_shapes()
    for name, array in original.parameters(empty):
        if array.shape != wanted[name]:
            made = "" if array.shape == original.shapes[last] else f", which makes {name} {array.shape}"
            raise SourceError(
                f"{original.file_of(last)}: tensor {last} is {original.shapes[last]}{made}, "
                f"wanted {wanted[name]} by {original.settings}: the two do not belong together"
            )
        del wanted[name]
    assert not wanted, f"the family gives no {sorted(wanted)}"
    _refuse_strangers(original, read_names)


def _stored_shape(original: Original, name: str) -> tuple[int, ...]:
    if name not in original.shapes:
        raise SourceError(
            f"{original.path}: tensor {name} is missing, wanted by {original.settings}: the source is incomplete"
        )
    return original.shapes[name]


def _refuse_strangers(original: Original, known: set[str]) -> None:
    strangers = sorted(name for name in original.shapes if name not in known and not original.unused(name))
    if strangers:
        raise SourceError(
            f"{original.file_of(strangers[0])}: tensor {strangers[0]} has no place in the decoder of family "
            f"{original.config.family!r} ({len(strangers)} such): the model has parts that are not supported"
        )


def write(original: Original, origin: str, folder: Path, progress: Progress) -> SourceModel:
    """Write the stage's files into `folder` (exists, empty). Raises SourceError; the caller clears the folder then."""
    check_shapes(original)
    stored = _write_weights(original, folder / "weights.safetensors", progress)
    codes = held(original, stored, Weights(folder / "weights.safetensors")) if stored else Held()
    if codes.tensors:
        save_codes(codes.tensors, folder / "codes.safetensors")
    _write_json(folder / "config.json", asdict(original.config))
    parity = original.save_tokenizer(folder / "tokenizer")
    _check_vocabulary(original, folder / "tokenizer")
    hashes = {str(path.name): sha256(path) for path in original.files}
    facts = {
        "name": original.name,
        "origin": origin,
        "license": original.license,
        "sha256": digest(hashes),
        "files": hashes,
        "tokenizer_parity": parity,
        "decoder_proof": SourceModel.decoder_proof,
    }
    if stored:
        facts["grids"] = {name: tensor.spec.name for name, tensor in codes.tensors.items()}
        facts["not_passed"] = dict(codes.not_passed)
    _write_json(folder / "source.json", facts)
    return open_stage(folder)


def _check_vocabulary(original: Original, folder: Path) -> None:
    """Raise SourceError where the tokenizer makes ids that the embedding has no row for. (Spare rows are usual.)"""
    from tokenizers import Tokenizer

    last = max(Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True).values())
    if last >= original.config.vocab_size:
        raise SourceError(
            f"{original.path}: the tokenizer has ids up to {last}, wanted below {original.config.vocab_size}, "
            f"the vocab_size of {original.settings}: it belongs to another model"
        )


def digest(hashes: dict[str, str]) -> str:
    """One sha256 for the files read: the file's own where it is one, else that of the lines `sha256  name`."""
    if len(hashes) == 1:
        return next(iter(hashes.values()))
    lines = "".join(f"{value}  {name}\n" for name, value in sorted(hashes.items()))
    return hashlib.sha256(lines.encode()).hexdigest()


def record_proof(folder: Path, sentence: str) -> SourceModel:
    """Write what the decoder proof found into source.json."""
    facts = json.loads((folder / "source.json").read_text(encoding="utf-8"))
    _write_json(folder / "source.json", {**facts, "decoder_proof": sentence})
    return open_stage(folder)


def open_stage(folder: Path) -> SourceModel:
    """Open what `write` wrote; weights are read when asked for. Raises SourceError for a foreign or damaged folder."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        facts = json.loads((folder / "source.json").read_text(encoding="utf-8"))
        model = SourceModel(
            name=facts["name"],
            config=DecoderConfig(**config),
            weights=Weights(folder / "weights.safetensors"),
            tokenizer=folder / "tokenizer",
            sha256=facts["sha256"],
            origin=facts["origin"],
            license=facts["license"],
            tokenizer_parity=facts["tokenizer_parity"],
            decoder_proof=facts["decoder_proof"],
            codes=Codes(folder / "codes.safetensors", facts.get("grids", {})),
            not_passed=facts.get("not_passed", {}),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"{folder}: not a source stage ({type(error).__name__}: {error}), wanted weights.safetensors, config.json, "
            "tokenizer/ and source.json: run the stage anew"
        ) from error
    if not (model.tokenizer / "tokenizer.json").is_file():
        raise SourceError(f"{folder}: no tokenizer/tokenizer.json, wanted a whole source stage: run the stage anew")
    if set(model.weights) != set(model.config.parameter_shapes()):
        raise SourceError(
            f"{folder}: weights.safetensors does not hold the parameters of config.json: run the stage anew"
        )
    return model


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(original: Original, path: Path, progress: Progress) -> dict[str, Stored]:
    """Write the float parameters; the tensors that were quantized, by the checkpoint's names."""
    shapes = dict(sorted(original.config.parameter_shapes().items()))
    ranges, total_bytes = _byte_ranges(shapes)
    header = json.dumps(
        {n: {"dtype": "F32", "shape": s, "data_offsets": ranges[n]} for n, s in shapes.items()}, separators=(",", ":")
    ).encode()
    header += b" " * (-len(header) % 8)
    done_bytes, stored = 0, dict[str, Stored]()
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name, array in original.parameters(_checked_read(original, stored)):
            file.seek(8 + len(header) + ranges[name][0])
            file.write(np.ascontiguousarray(array, dtype="<f4").data)
            done_bytes += array.size * FLOAT32_BYTES
            progress(done_bytes, total_bytes)
    return stored


def _byte_ranges(shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, tuple[int, int]], int]:
    ranges, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + int(np.prod(shape)) * FLOAT32_BYTES
        ranges[name] = (start, end)
    return ranges, end


def _checked_read(original: Original, quantized: dict[str, Stored]) -> Read:
    """Read tensors, refusing by name one that holds NaN or infinity; keep those that are quantized."""

    def read(name: str) -> Float:
        stored = original.stored(name)
        if stored is not None:
            quantized[name] = stored if isinstance(stored, QuantizedTensor) else replace(stored, values=EMPTY)
        array = original.read(name) if stored is None else stored.dequantize()
        if not np.isfinite(array).all():
            count = int(array.size - np.isfinite(array).sum())
            raise SourceError(
                f"{original.file_of(name)}: tensor {name} holds {count} NaN or infinite values of {array.size}, "
                "wanted finite ones: the file is damaged or its training diverged"
            )
        return array

    return read
