"""A Hugging Face folder: config.json, weights as safetensors (one file, or shards with an index), tokenizer files.

Pickled weights (pytorch_model.bin) can run code when they are read, and `auto_map` names code of the folder itself:
both are refused unless asked for. Pickles are then read by torch.load(weights_only=True).

Where config.json has a `quantization_config`, the tensors of each quantized matrix stand for the one tensor that they
were made from (lilliput.sources.quantized).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import yaml

from lilliput import parity
from lilliput.errors import SourceError
from lilliput.families import Family, Read, family_of
from lilliput.grid import Float
from lilliput.model import DecoderConfig
from lilliput.sources import quantized
from lilliput.sources.stored import Stored
from lilliput.tokenizer import save_generation_config

if TYPE_CHECKING:
    from torch import Tensor

SAFETENSORS, PICKLE = "model.safetensors", "pytorch_model.bin"
MODEL_CARD = "README.md"
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "tokenizer.model", "chat_template.jinja", "generation_config.json",
)  # fmt: skip
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")  # one of them makes a tokenizer
FLOAT_DTYPES = ("F64", "F32", "F16", "BF16")
CODE_DTYPES = ("I64", "I32", "I8", "U8")  # of quantized checkpoints
CONV1D = ("gpt2",)  # keep their matrices as (in, out)


@dataclass(frozen=True)
class Shard:
    """An open weights file: shapes of its tensors, and how to read one."""

    path: Path
    shapes: Mapping[str, tuple[int, ...]]
    read: Callable[[str], Tensor]


@dataclass(frozen=True, eq=False)
class HfFolder:
    """An opened folder (an `Original`)."""

    path: Path
    hf: Mapping[str, Any]
    config: DecoderConfig
    family: Family
    shards: tuple[Shard, ...]
    index: Path | None  # where the weights are in shards
    allow_remote_code: bool
    settings: str = "config.json"

    @property
    def name(self) -> str:
        return self.path.resolve().name

    @property
    def files(self) -> tuple[Path, ...]:
        index = [self.index] if self.index else []
        names = ("config.json", MODEL_CARD, *TOKENIZER_FILES)
        others = [self.path / name for name in names if (self.path / name).is_file()]
        return (*(shard.path for shard in self.shards), *index, *others)

    @property
    def license(self) -> str | None:
        return license_of(self.path / MODEL_CARD)

    @cached_property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        parts = {part for matrix in self.matrices.values() for part in matrix.parts.names.values()}
        plain = {name: shape for name, shape in self._stored_shapes.items() if name not in parts}
        return plain | {name: matrix.shape for name, matrix in self.matrices.items()}

    @cached_property
    def matrices(self) -> Mapping[str, quantized.Matrix]:
        """Those that are quantized, by the name of the tensor that each was made from."""
        settings = self.hf.get("quantization_config")
        return quantized.matrices(settings, self._stored_shapes, self._raw) if settings else {}

    @cached_property
    def _stored_shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: shape for shard in self.shards for name, shape in shard.shapes.items()}

    @cached_property
    def _shard_of(self) -> Mapping[str, Shard]:
        return {name: shard for shard in self.shards for name in shard.shapes}

    def unused(self, name: str) -> bool:
        tied = self.config.tied_embeddings and name == "lm_head.weight"
        return tied or self.family.UNUSED.fullmatch(name) is not None or self._zero_bias(name)

    def _zero_bias(self, name: str) -> bool:
        """AutoGPTQ gave every linear layer a bias, one of zeros where the model has none."""
        beside = name.removesuffix(".bias") + ".weight" in self.matrices
        return name.endswith(".bias") and beside and not self.read(name).any()

    def file_of(self, name: str) -> str:
        first = next(iter(self.matrices[name].parts.names.values())) if name in self.matrices else name
        return self._shard_of[first].path.name

    def read(self, name: str) -> Float:
        if stored := self.stored(name):
            return stored.dequantize()
        array = self._raw(name)
        if array.dtype != np.float32:
            raise SourceError(
                f"{self.file_of(name)}: tensor {name} is {array.dtype} and has no scales beside it, wanted a float: "
                "the file is damaged, or of another format than quantization_config says"
            )
        return array

    def stored(self, name: str) -> Stored | None:
        return self.matrices[name].read() if name in self.matrices else None

    def _raw(self, name: str) -> npt.NDArray[Any]:
        """A tensor as the file holds it: integers as they are, floats as float32."""
        import torch

        tensor = self._shard_of[name].read(name).detach()
        array: npt.NDArray[Any] = (
            (tensor.to(torch.float32) if tensor.is_floating_point() else tensor).contiguous().numpy()
        )
        return array

    def dequantized(self) -> Mapping[str, Float] | None:
        return Tensors(self) if self.matrices else None

    def parameters(self, read: Read) -> Iterator[tuple[str, Float]]:
        return self.family.weights(self.config, read, frozenset(self.shapes))

    def save_tokenizer(self, folder: Path) -> str:
        return save_tokenizer(self.path, self.hf, folder, self.allow_remote_code)


class Tensors(Mapping[str, Float]):
    """The folder's tensors by its own names, each read when asked for."""

    def __init__(self, folder: HfFolder) -> None:
        self._folder = folder

    def __getitem__(self, name: str) -> Float:
        return self._folder.read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._folder.shapes)

    def __len__(self) -> int:
        return len(self._folder.shapes)


def open_folder(path: Path, *, allow_pickle: bool = False, allow_remote_code: bool = False) -> HfFolder:
    """Open a folder. Raises SourceError naming what is missing, damaged, not supported or not allowed."""
    hf = _read_config(path, allow_remote_code)
    if not any((path / name).is_file() for name in VOCABULARY_FILES):
        raise SourceError(
            f"{path}: no tokenizer, wanted {' or '.join(VOCABULARY_FILES)}: save the model's tokenizer beside it"
        )
    name, family = family_of(hf)
    quantization = hf.get("quantization_config")
    if quantization and name in CONV1D:
        raise SourceError(
            f"{path / 'config.json'}: quantization_config of a {name}, whose matrices lie transposed, is not read: "
            "use a GGUF file, or the float checkpoint it was made from"
        )
    config = family.config(hf)
    shards, index = _open_shards(path, allow_pickle, FLOAT_DTYPES + (CODE_DTYPES if quantization else ()))
    return HfFolder(path, hf, config, family, shards, index, allow_remote_code)


def _read_config(path: Path, allow_remote_code: bool) -> dict[str, Any]:
    if not (path / "config.json").is_file():
        raise SourceError(f"{path}: no config.json, wanted a Hugging Face model folder: check the path")
    hf = _read_json(path / "config.json")
    if hf.get("auto_map") and not allow_remote_code:
        raise SourceError(
            f"{path / 'config.json'}: auto_map asks to run code of the model folder itself, which is refused: "
            "read that code, then allow it explicitly (allow_remote_code)"
        )
    return hf


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SourceError(f"{path}: not readable as JSON ({error}): get the file anew") from error
    if not isinstance(value, dict):
        raise SourceError(f"{path}: holds a JSON {type(value).__name__}, wanted an object: get the file anew")
    return value


def _open_shards(
    path: Path, allow_pickle: bool, dtypes: tuple[str, ...]
) -> tuple[tuple[Shard, ...], Path | None]:  # fmt: skip
    """The files of the weights, whose tensors are of these dtypes."""
    openers = ((SAFETENSORS, partial(_open_safetensors, dtypes=dtypes)), (PICKLE, _open_pickle))
    for single, opener in openers:
        index = path / f"{single}.index.json"
        if not index.is_file() and not (path / single).is_file():
            continue
        if single == PICKLE and not allow_pickle:
            raise SourceError(
                f"{path}: its weights are pickled ({PICKLE}), and pickles can run code: use safetensors, "
                "or allow it explicitly (allow_pickle) if you trust where they are from"
            )
        return (_open_indexed(index, opener), index) if index.is_file() else ((opener(path / single),), None)
    raise SourceError(f"{path}: no weights, wanted {SAFETENSORS} or {SAFETENSORS}.index.json: check the download")


def _open_indexed(index: Path, opener: Callable[[Path], Shard]) -> tuple[Shard, ...]:
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise SourceError(f"{index}: no weight_map, wanted tensor names and their shards: get the file anew")
    shards = []
    for name in sorted(set(places.values())):
        if Path(name).name != name:
            raise SourceError(f"{index}: shard {name!r} is not a file name of this folder: get the file anew")
        shard = opener(index.parent / name)
        absent = sorted(tensor for tensor, place in places.items() if place == name and tensor not in shard.shapes)
        if absent:
            raise SourceError(
                f"{shard.path}: tensor {absent[0]} is missing, which {index.name} says is there "
                f"({len(absent)} such): get the shard anew"
            )
        shards.append(shard)
    return tuple(shards)


def _open_safetensors(path: Path, dtypes: tuple[str, ...]) -> Shard:
    from safetensors import safe_open

    if not path.is_file():
        raise SourceError(f"{path}: shard is missing: the download is not complete")
    try:
        file = safe_open(path, framework="pt")  # numpy has no bfloat16
    except Exception as error:  # safetensors raises its own untyped errors
        raise SourceError(f"{path}: truncated or no safetensors file ({error}): get the file anew") from error
    names = file.keys()  # type: ignore[no-untyped-call]
    slices = {name: file.get_slice(name) for name in names}  # type: ignore[no-untyped-call]
    for name, part in slices.items():
        if part.get_dtype() not in dtypes:
            raise SourceError(
                f"{path.name}: tensor {name} is {part.get_dtype()}, wanted one of {', '.join(dtypes)}: "
                "use the float checkpoint that it was made from"
            )
    return Shard(path, {name: tuple(part.get_shape()) for name, part in slices.items()}, file.get_tensor)


def _open_pickle(path: Path) -> Shard:
    import torch

    if not path.is_file():
        raise SourceError(f"{path}: shard is missing: the download is not complete")
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # unpickling raises whatever the bytes provoke
        reason = str(error).strip().splitlines()[0]
        raise SourceError(
            f"{path}: truncated or no checkpoint of plain tensors ({reason}): get the file anew"
        ) from error
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise SourceError(f"{path}: holds no dictionary of tensors: get the file anew")
    return Shard(path, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, tensors.__getitem__)


def license_of(readme: Path) -> str | None:
    """The `license` of a model card's front matter, or None."""
    if not readme.is_file():
        return None
    front = re.match(r"---\s*\n(.*?)\n---\s*\n", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        card = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        return None
    value = card.get("license") if isinstance(card, dict) else None
    return str(value) if value else None


def save_tokenizer(source: Path, hf: Mapping[str, Any], folder: Path, allow_remote_code: bool) -> str:
    """Copy the tokenizer so that the folder opens on its own, as a fast tokenizer; the sentence on its parity."""
    from transformers import AutoTokenizer

    parity.encoder(source, allow_remote_code=allow_remote_code)  # one clear error where it does not open
    tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=allow_remote_code)
    if not tokenizer.is_fast:
        raise SourceError(
            f"{source}: its tokenizer {type(tokenizer).__name__} has no fast form, and every runtime needs "
            "tokenizer.json: convert it with the transformers package and save it beside the model"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if (source / "tokenizer.json").is_file():
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        _name_class(folder / "tokenizer_config.json", type(tokenizer).__name__)
    else:
        tokenizer.save_pretrained(folder)
    if not (folder / "generation_config.json").is_file():
        ends = hf.get("eos_token_id", tokenizer.eos_token_id)
        end_ids = ends if isinstance(ends, list) else [] if ends is None else [ends]
        save_generation_config(folder, hf.get("bos_token_id"), end_ids, hf.get("pad_token_id"))
    return parity.against_folder(source, folder, allow_remote_code=allow_remote_code)


def _name_class(path: Path, tokenizer_class: str) -> None:
    """AutoTokenizer asks config.json for the class where tokenizer_config.json does not name it: name it."""
    settings = _read_json(path) if path.is_file() else {}
    if not settings.get("tokenizer_class"):
        text = json.dumps({**settings, "tokenizer_class": tokenizer_class}, indent=2, sort_keys=True)
        path.write_text(text + "\n", encoding="utf-8")
