"""An opened file, as rules see it: its tensors with their numbers, and what it says of the model and of text.

Numbers are read when a rule asks for them, dequantized by the format's own formula, so that rules on weights are the
same for all formats. What only one format has (nodes, metadata keys, subgraphs) is in its own view: onnx_view,
gguf_view, tflite_view.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lilliput.checks.base import Format, NotCheckedError
from lilliput.grid import Float
from lilliput.model import Role

if TYPE_CHECKING:
    from lilliput.checks.comparison import Comparison, Source
    from lilliput.checks.gguf_view import GgufFile
    from lilliput.checks.onnx_view import OnnxFile
    from lilliput.checks.tflite_view import TfliteFile

FLOATS = ("float", "float16", "float32", "double", "bfloat16", "F32", "F16", "BF16", "F64", "FLOAT32", "FLOAT16")


@dataclass(frozen=True)
class Part:
    """A decoder parameter (lilliput.model) that is some rows of a stored tensor."""

    parameter: str
    rows: int


@dataclass(frozen=True, eq=False)
class Tensor:
    """A stored tensor of weights.

    `shape` is logical: a matrix is (rows, cols) = (out, in). `block` is how many columns share a scale (0: a row, or
    no scale). `paired` is how far apart two codes of one byte lie in a row (0: a code is a byte or more). `parts` are
    the decoder parameters in it from top to bottom, empty where the file does not say.
    """

    name: str
    role: Role
    dtype: str
    shape: tuple[int, ...]
    block: int
    read: Callable[[], Float]  # in the stored order of rows
    paired: int = 0
    parts: tuple[Part, ...] = ()

    @property
    def quantized(self) -> bool:
        return self.dtype not in FLOATS

    @property
    def weights(self) -> int:
        return int(np.prod(self.shape))

    def matrix(self) -> Float:
        """(rows, cols): kernels of more dimensions are flattened behind the first."""
        values = self.read()
        return values.reshape(values.shape[0], -1) if values.ndim > 1 else values.reshape(1, -1)


@dataclass(frozen=True, eq=False)
class Parameter:
    """A decoder parameter as the file holds it, in the decoder's order of rows."""

    name: str
    tensor: Tensor
    values: Float


@dataclass(frozen=True)
class Fact:
    """What the file says of the model, and where it says so."""

    value: int | float | str
    place: str


@dataclass(frozen=True)
class Text:
    """What the file, or the files beside it, say of text. None: nothing is said.

    `folder` is what transformers' AutoTokenizer opens.
    """

    place: str
    tokens: int | None = None
    end_ids: tuple[int, ...] | None = None
    end_place: str = ""
    template: str | None = None
    template_place: str = ""
    folder: Path | None = None


@dataclass(frozen=True, eq=False)
class Opened:
    """One model file. `claimed` is where its name, metadata or manifest says that it is quantized, and how."""

    path: Path
    format: Format
    tensors: tuple[Tensor, ...]
    facts: Mapping[str, Fact]  # by field of DecoderConfig; `context` is what the file's own caches or tables hold
    parameters: Callable[[], Iterator[Parameter]]
    text: Text | None = None
    claimed: Fact | None = None
    onnx_file: OnnxFile | None = None
    gguf_file: GgufFile | None = None
    tflite_file: TfliteFile | None = None
    against: Source | None = None
    changes: tuple[str, ...] = ()  # files that are not as the manifest beside them lists them
    runtime_versions: Mapping[str, str] = field(default_factory=dict)  # by package: those installed here

    @property
    def onnx(self) -> OnnxFile:
        assert self.onnx_file is not None, "a rule of ONNX files"
        return self.onnx_file

    @property
    def gguf(self) -> GgufFile:
        assert self.gguf_file is not None, "a rule of GGUF files"
        return self.gguf_file

    @property
    def tflite(self) -> TfliteFile:
        assert self.tflite_file is not None, "a rule of TFLite files"
        return self.tflite_file

    @property
    def source(self) -> Source:
        assert self.against is not None, "a rule that needs a source"
        return self.against

    @property
    def matrices(self) -> tuple[Tensor, ...]:
        """Everything of two dimensions or more that is multiplied or looked up."""
        return tuple(tensor for tensor in self.tensors if len(tensor.shape) > 1 and tensor.role != "vector")

    @property
    def embedding(self) -> Tensor | None:
        """The largest table that is looked up."""
        tables = [tensor for tensor in self.matrices if tensor.role == "embedding"]
        return max(tables, key=lambda tensor: tensor.weights, default=None)

    @property
    def names_parameters(self) -> bool:
        """Whether the file says which parameter each tensor holds; in others they are recognised by their numbers."""
        return self.format == "gguf" or any(tensor.parts for tensor in self.tensors)

    @cached_property
    def comparison(self) -> Comparison:
        """The weights against the source's; made once for all rules."""
        from lilliput.checks import comparison

        return comparison.compare(self)

    def tokenizer_folder(self) -> Path:
        if self.text is None or self.text.folder is None:
            raise NotCheckedError("no tokenizer in the file or beside it")
        return self.text.folder


def split_rows(tensors: tuple[Tensor, ...]) -> Iterator[Parameter]:
    """The parameters of tensors whose parts lie one below another in the decoder's own order."""
    for tensor in tensors:
        if not tensor.parts:
            continue
        values, begin = tensor.read(), 0
        for part in tensor.parts:
            yield Parameter(part.parameter, tensor, values[begin : begin + part.rows])
            begin += part.rows
