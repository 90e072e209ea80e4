"""The weights of a file against those of its float source, tensor by tensor: what is wrong, and what it looks like.

Two numbers tell a good block from a bad one whatever the grid and the solver: the cosine between the file's block and
the source's, and the gain <file, source> / <source, source>. Rounding, GPTQ and a search of scales leave the cosine
of a whole matrix above 0.7 (2 bits, plain rounding; 4 bits: 0.99) and its gain near 1, while a matrix that is another
one, transposed, or in another order has a cosine near 0, as weights of different places are all but orthogonal. So
SAME = 0.6 decides, and the transformations below are tried until one brings the cosine back:

    another parameter of the same shape; the transposed matrix; codes of a byte swapped; rows of a head interleaved or
    in halves; blocks moved by one; the sign

A block is suspect (a warning) where its cosine is below BLOCK_COSINE, by bits, or, at 4 bits and more, its gain leaves
[1/GAIN, GAIN]; blocks whose source is below a hundredth of its row's are left out. Rounding to nearest keeps 0.9 of 32
columns at 4 bits and 0.7 at 3; at 2 bits good blocks may lose everything, and are not judged. GPTQ moves errors into
columns that inputs hardly use: in a SmolLM2-135M of 4 bits, cosines of single blocks go down to 0.13 and gains from
0.14 to 1.47, in at most 0.2 % of a matrix whose cosines are spread widely. So where less than FEW of the blocks are
beyond a bound, it widens with the matrix: no nearer to the median than SPREADS times its distance from the first
percentile (for gains that are high: from the last).

Scales that moved by one block leave the matrix at a cosine of 0.97: there the logarithms of the gains spread as those
of neighbouring blocks' largest weights do, and dividing these out must halve the spread.

What a chain of solvers may do is no defect: SmoothQuant and AWQ multiply columns (and norms, and rows of values and up
matrices) by factors. Where columns or rows, each for itself, have the source's direction, their factors are divided
out first, a norm must carry their inverse, and single blocks are not judged. QAT moves norms by a few per cent: they
pass at a cosine of 0.99.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from lilliput.grid import Float
from lilliput.model import DecoderConfig

if TYPE_CHECKING:
    from lilliput.checks.opened import Opened, Parameter, Tensor

Kind = Literal["block", "scales", "other", "transposed", "nibbles", "rows", "norm", "unlike", "missing", "shape"]
SAME = 0.6
BLOCK_COSINE = {2: -1.0, 3: 0.2}  # 4 bits and more: 0.4
GAIN = 1.6
SPREADS, FEW = 5.0, 0.01
NEGLIGIBLE = 0.01
SHIFT_SPREAD = 0.04  # spread of log gains below which scales are not suspected
VECTOR_COSINE, VECTOR_GAIN = 0.99, 1.25
FITS = 3
LEAST_FACTOR = np.float32(1e-3)  # a factor below is no solver's
ROWS_KEPT = 16  # of each source matrix, to recognise it by


@dataclass(frozen=True)
class Difference:
    """Something that is not as in the source."""

    kind: Kind
    place: str
    what: str


@dataclass(frozen=True, eq=False)
class Source:
    """The float model that a file claims to be. `tokenizer` is a folder for transformers' AutoTokenizer."""

    name: str
    config: DecoderConfig
    weights: Mapping[str, Float]
    tokenizer: Path

    @cached_property
    def samples(self) -> Mapping[str, Float]:
        """The first rows of every parameter."""
        return {name: np.array(self.weights[name][:ROWS_KEPT]) for name in self.weights}


@dataclass
class Factors:
    """Factors by which a chain of solvers multiplied the columns and rows of a parameter."""

    columns: dict[str, Float] = field(default_factory=dict)
    rows: dict[str, Float] = field(default_factory=dict)


def cosine(a: Float, b: Float) -> float:
    norm = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return float(np.vdot(a, b)) / norm if norm else 0.0


@dataclass(frozen=True)
class Comparison:
    """What differs, and the tensors that were compared, by name."""

    differences: tuple[Difference, ...]
    compared: frozenset[str]


def compare(opened: Opened) -> Comparison:
    """All that differs. Vectors come last: whether a norm is right depends on the factors of the matrices behind it."""
    compared = set[str]()
    return Comparison(tuple(_differences(opened, opened.source, compared)), frozenset(compared))


def _differences(opened: Opened, source: Source, compared: set[str]) -> Iterator[Difference]:
    factors, vectors, seen = Factors(), list[tuple[str, str, Float]](), set[str]()
    for parameter in opened.parameters():
        seen.add(parameter.name)
        compared.add(parameter.tensor.name)
        if parameter.name not in source.weights:
            continue  # a head of its own beside a tied embedding is seen by the configuration
        wanted = np.asarray(source.weights[parameter.name], np.float32)
        if parameter.values.shape != wanted.shape:
            yield _other_shape(parameter, wanted)
        elif wanted.ndim == 2 and "position" not in parameter.name:
            yield from _matrix(parameter, wanted, source, factors)
        else:
            vectors.append((parameter.name, parameter.tensor.name, parameter.values))
    for name, place, values in vectors:
        yield from _vector(name, place, values, source, factors)
    if seen and opened.names_parameters:
        absent = [name for name in source.config.parameter_shapes() if name not in seen]
        yield from (Difference("missing", name, f"the source has {name}, the file does not") for name in absent)


def _other_shape(parameter: Parameter, wanted: Float) -> Difference:
    values, place = parameter.values, _place(parameter)
    if values.shape == wanted.shape[::-1] and cosine(values.T, wanted) >= SAME:
        return Difference("transposed", place, f"is {values.shape}, the source's matrix transposed")
    return Difference("shape", place, f"is {values.shape}, the source's {parameter.name} is {wanted.shape}")


def _place(parameter: Parameter) -> str:
    name = parameter.tensor.name
    return name if parameter.name == name.removesuffix(".codes") else f"{name} ({parameter.name})"


def _matrix(parameter: Parameter, wanted: Float, source: Source, factors: Factors) -> Iterator[Difference]:
    values, place = parameter.values, _place(parameter)
    kind = parameter.tensor
    moved = _moved_scales(values, wanted, kind)
    if moved:
        yield Difference("scales", place, f"the scales are those of the block {moved} (in row-major order)")
        return
    folded = _unfold(parameter, wanted, factors)
    if folded is None:
        yield _explained(parameter, wanted, source)
        return
    if np.abs(np.log(np.maximum(factors.columns[parameter.name], LEAST_FACTOR))).max() < np.log(GAIN):
        yield from _blocks(folded, wanted, kind, place)  # where columns were multiplied, single blocks tell nothing


def _unfold(parameter: Parameter, wanted: Float, factors: Factors) -> Float | None:
    """The values with the factors of solvers divided out; None where they are not the source's, even so."""
    values = parameter.values
    alike = cosine(values, wanted) >= SAME
    for axis, kept in ((0, factors.columns), (1, factors.rows)):  # of few columns, too: a norm carries them all
        kept[parameter.name] = _along(values, wanted, axis)[0].reshape(-1)
    if alike and _even(values, wanted, 0) and _even(values, wanted, 1):
        return values
    columns, rows = np.ones((1, values.shape[1]), np.float32), np.ones((len(values), 1), np.float32)
    for _ in range(FITS):  # each axis in turn: a value matrix has factors along both
        columns *= _factors(values / (columns * rows), wanted, 0)
        rows *= _factors(values / (columns * rows), wanted, 1)
    folded = np.asarray(values / (columns * rows), np.float32)
    if all(np.quantile(_along(folded, wanted, axis)[1], 0.05) >= SAME for axis in (0, 1)):
        factors.rows[parameter.name] = rows.reshape(-1)
        return folded
    return values if alike else None


def _factors(values: Float, wanted: Float, axis: int) -> Float:
    """Gains that may be a solver's; 1 where rounding left nothing of a column."""
    gains, _ = _along(values, wanted, axis)
    return np.where(gains > LEAST_FACTOR, gains, np.float32(1))


def _even(values: Float, wanted: Float, axis: int) -> bool:
    """Whether no column (axis 0) or row has a factor of its own: gains lie within a fifth of their median."""
    gains, _ = _along(values, wanted, axis)
    middle = float(np.median(gains))
    return middle > 0 and float(np.quantile(np.abs(gains / middle - 1), 0.9)) < 0.2


def _along(values: Float, wanted: Float, axis: int) -> tuple[Float, Float]:
    """(gains, cosines) of each column (axis 0) or row (axis 1)."""
    product = (values * wanted).sum(axis, keepdims=True)
    own, theirs = (values**2).sum(axis, keepdims=True), (wanted**2).sum(axis, keepdims=True)
    tiny = np.float32(1e-30)
    gains = np.where(theirs > tiny, product / np.maximum(theirs, tiny), 1)
    cosines = np.where(theirs > tiny, product / np.sqrt(np.maximum(own * theirs, tiny)), 1)
    return np.asarray(gains, np.float32), np.asarray(cosines, np.float32)


@dataclass(frozen=True, eq=False)
class Blocks:
    """Cosines, gains and the source's largest weight of each block: (rows, n_blocks)."""

    cosines: Float
    gains: Float
    largest: Float
    counts: npt.NDArray[np.bool_]  # blocks that say something


def blocks_of(values: Float, wanted: Float, block: int) -> Blocks:
    rows, cols = wanted.shape
    width = block or cols
    padding = [(0, 0), (0, -cols % width)]
    theirs = np.pad(wanted, padding).reshape(rows, -1, width)
    own = np.pad(values, padding).reshape(rows, -1, width)
    product, square = (own * theirs).sum(-1), (theirs**2).sum(-1)
    length = np.sqrt((own**2).sum(-1) * square)
    whole = np.sqrt(square.sum(1, keepdims=True) / max(theirs.shape[1], 1))
    counts = np.sqrt(square) > NEGLIGIBLE * np.maximum(whole, 1e-20)
    cosines = np.divide(product, length, out=np.zeros_like(product), where=length > 0)
    gains = np.divide(product, square, out=np.ones_like(product), where=square > 0)
    return Blocks(cosines, gains, np.abs(theirs).max(-1), counts)


def _moved_scales(values: Float, wanted: Float, kind: Tensor) -> str:
    """ "before it" or "after it" where the scales are those of a neighbouring block; empty where they are not."""
    found = blocks_of(values, wanted, kind.block)
    if not kind.quantized or found.gains.size < 8 or np.median(found.cosines) < 0.8 or (found.gains <= 0).any():
        return ""
    gains = np.log(found.gains.reshape(-1))
    largest = np.log(np.maximum(found.largest.reshape(-1), 1e-20))
    if _spread(gains) < SHIFT_SPREAD:
        return ""
    for step, name in ((1, "before it"), (-1, "after it")):
        if _spread(gains - (np.roll(largest, step) - largest)) < 0.5 * _spread(gains):
            return name
    return ""


def _spread(values: Float) -> float:
    """Half the distance between the 10th and the 90th percentile."""
    low, high = np.quantile(values, (0.1, 0.9))
    return float(high - low) / 2


def _blocks(values: Float, wanted: Float, kind: Tensor, place: str) -> Iterator[Difference]:
    bits = bits_of(kind.dtype)
    found = blocks_of(values, wanted, kind.block)
    if not found.counts.any():
        return
    bound = BLOCK_COSINE.get(bits, 0.4)
    bad = _beyond(found.cosines, bound, found.counts)
    if bad.any():
        yield Difference("block", place, f"{_where(bad, kind.block)} not as in the source")
        return
    wrong = _beyond(found.gains, 1 / GAIN, found.counts) | _beyond(-found.gains, -GAIN, found.counts)
    if bits >= 4 and wrong.any():
        row, block = np.argwhere(wrong)[0]
        yield Difference(
            "block", place, f"{_where(wrong, kind.block)} scaled wrongly, the first by {found.gains[row, block]:.3g}"
        )


def _beyond(values: Float, bound: float, counts: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """Which blocks lie below the bound; where they are few, below what the matrix's own spread allows."""
    below = (values < bound) & counts
    if below.sum() > FEW * counts.sum():
        return below
    first, middle = (float(q) for q in np.quantile(values[counts], (0.01, 0.5)))
    return below & (values < middle - SPREADS * (middle - first))


def bits_of(dtype: str) -> int:
    """Bits of a code by the format's name of a type; 32 for floats that name none."""
    if dtype.startswith("TQ"):
        return 2
    digits = next((c for c in dtype if c.isdigit()), "")
    return {"1": 16, "3": 32 if "32" in dtype else 3}.get(digits, int(digits or 32))


def _where(bad: npt.NDArray[np.bool_], block: int) -> str:
    """ "1 block (row 3, columns 32 to 63) is" or "17 blocks, the first row 3, columns 32 to 63, are"."""
    row, index = (int(i) for i in np.argwhere(bad)[0])
    at = f"row {row}, columns {index * block} to {(index + 1) * block - 1}" if block else f"row {row}"
    count = int(bad.sum())
    return f"1 block ({at}) is" if count == 1 else f"{count} blocks (the first: {at}) are"


def _explained(parameter: Parameter, wanted: Float, source: Source) -> Difference:
    """Which transformation makes the matrix the source's."""
    values, place, name = parameter.values, _place(parameter), parameter.name
    other = _recognised(values, source, name)
    if other:
        return Difference("other", place, f"holds the weights of {other}")
    if cosine(values.reshape(wanted.shape[::-1]).T, wanted) >= SAME:
        return Difference("transposed", place, "is the source's matrix transposed")
    paired = parameter.tensor.paired
    if paired and values.shape[1] % (2 * paired) == 0 and cosine(_swapped(values, paired), wanted) >= SAME:
        return Difference("nibbles", place, "the two codes of each byte are swapped")
    for what, order in _row_orders(name, source.config, len(values)):
        if cosine(values[order], wanted) >= SAME:
            return Difference("rows", place, what)
    block = parameter.tensor.block
    for step in (block, -block) if 0 < block < values.shape[1] else ():
        if cosine(np.roll(values.reshape(-1), step).reshape(values.shape), wanted) >= SAME:
            return Difference("block", place, f"all blocks lie one {'too early' if step > 0 else 'too late'}")
    close = cosine(values, wanted)
    what = "is the source's matrix negated" if close <= -SAME else f"is not the source's: cosine {close:.2f}"
    return Difference("unlike", place, what)


def _recognised(values: Float, source: Source, name: str) -> str:
    """The other parameter that a matrix holds, or nothing."""
    rows = values[:ROWS_KEPT]
    best, closest = "", SAME
    for other, sample in source.samples.items():
        if other != name and sample.shape == rows.shape and (close := cosine(rows, sample)) > closest:
            best, closest = other, close
    return best


def _swapped(values: Float, paired: int) -> Float:
    """Columns j and j + paired of each group exchanged."""
    rows, cols = values.shape
    return values.reshape(rows, cols // (2 * paired), 2, paired)[:, :, ::-1].reshape(rows, cols)


def _row_orders(name: str, config: DecoderConfig, rows: int) -> Iterator[tuple[str, np.ndarray]]:
    """Orders of q's and k's rows that a converter may have left out, or done twice."""
    if not name.endswith(("attention.q", "attention.k")) or rows % config.head_dim:
        return
    numbers = np.arange(rows).reshape(-1, config.head_dim)
    halves = numbers.reshape(-1, 2, config.head_dim // 2).swapaxes(1, 2).reshape(-1)
    pairs = numbers.reshape(-1, config.head_dim // 2, 2).swapaxes(1, 2).reshape(-1)
    yield "the rows of each head are in halves where the runtime rotates neighbours", halves
    yield "the rows of each head are interleaved where the runtime rotates halves", pairs


NORM_OF = {"attention_norm": ("attention.q", "attention.k", "attention.v"), "mlp_norm": ("mlp.gate", "mlp.up")}


def _vector(name: str, place: str, values: Float, source: Source, factors: Factors) -> Iterator[Difference]:
    wanted = np.asarray(source.weights[name], np.float32)
    if _alike(values, wanted) or any(_parallel(values * f, wanted) for f in _behind(name, factors, len(values))):
        return
    shown = place if place == name else f"{place} ({name})"
    if _alike(values + 1, wanted):
        yield Difference("norm", shown, "lacks the 1 that this family adds to norm weights")
    elif _alike(values - 1, wanted):
        yield Difference("norm", shown, "has 1 added to norm weights that are whole already")
    else:
        other = _same_vector(values, source, name)
        what = f"holds the numbers of {other}" if other else f"differs from the source's by {_off(values, wanted)}"
        yield Difference("other" if other else "unlike", shown, what)


def _behind(name: str, factors: Factors, size: int) -> Iterator[Float]:
    """Factors that undo what solvers did to a norm (its readers' columns) or a bias (its own matrix's rows)."""
    bare = name.removesuffix(".bias")
    for kind, readers in NORM_OF.items():
        if bare.endswith(kind):
            prefix = bare.removesuffix(kind)
            yield from (factors.columns[prefix + r] for r in readers if prefix + r in factors.columns)
    own = factors.rows.get(bare)
    if own is not None and len(own) == size:
        yield np.asarray(1 / own, np.float32)


def _alike(values: Float, wanted: Float) -> bool:
    """Near enough for what training on the grid may move."""
    size, gain = float(np.linalg.norm(wanted)), 0.0
    if size == 0:
        return float(np.abs(values).max(initial=0)) < 0.05
    gain = float(np.vdot(values, wanted)) / size**2
    return cosine(values, wanted) >= VECTOR_COSINE and 1 / VECTOR_GAIN < gain < VECTOR_GAIN


def _parallel(values: Float, wanted: Float) -> bool:
    """The same but for one factor: how columns and rows share theirs cannot be told."""
    return cosine(values, wanted) >= VECTOR_COSINE


def _same_vector(values: Float, source: Source, name: str) -> str:
    for other, wanted in source.weights.items():
        if other != name and wanted.shape == values.shape and np.allclose(values, wanted, rtol=2e-3, atol=1e-5):
            return other
    return ""


def _off(values: Float, wanted: Float) -> str:
    size = float(np.linalg.norm(wanted)) or 1.0
    return f"{100 * float(np.linalg.norm(values - wanted)) / size:.3g} % of its length"


def identify(tensors: tuple[Tensor, ...], source: Source) -> Iterator[Parameter]:
    """The parameters in a file that names none: each matrix is the source's of the same width that is most alike, or
    several of them one below another (q, k and v in one).

    Matrices that are stored (in, out), as MatMul takes them, are turned. What is like nothing is left out.
    """
    from lilliput.checks.opened import Parameter

    for tensor in tensors:
        values = tensor.read()
        if values.ndim != 2:
            continue
        for matrix in (values, values.T):
            parts = _stacked(matrix, source)
            for name, begin, end in parts:
                yield Parameter(name, replace(tensor, paired=0), np.ascontiguousarray(matrix[begin:end]))
            if parts:
                break


def _stacked(matrix: Float, source: Source) -> list[tuple[str, int, int]]:
    """The source's matrices that lie in this one from top to bottom, with their rows; nothing where one is unknown."""
    shapes, found, begin = source.config.parameter_shapes(), list[tuple[str, int, int]](), 0
    while begin < len(matrix):
        name = _recognised(matrix[begin:], source, "")
        if not name or shapes[name][-1] != matrix.shape[1] or begin + shapes[name][0] > len(matrix):
            return []
        found.append((name, begin, begin + shapes[name][0]))
        begin = found[-1][2]
    return found
