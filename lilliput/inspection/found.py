"""What an inspection finds: tensors with their storage, metadata, and the manifest's word on the files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from lilliput.model import Role
from lilliput.results import Record

LONGEST_VALUE = 120  # characters of a metadata value that are shown


class TensorFound(Record):
    """One stored tensor. `dtype` is the format's own name of a float or grid, or ours where the format has none.

    `size_bytes` counts its scales and offsets. Where embedding and head are one tensor, its role is the
    embedding's and `shared` is set.
    """

    name: str
    role: Role
    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    shared: bool = False

    @property
    def weights(self) -> int:
        return prod(self.shape)


class Group(Record):
    """Tensors of one role and dtype."""

    role: Role
    dtype: str
    tensors: int
    weights: int
    size_bytes: int

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.size_bytes / self.weights if self.weights else 0.0


@dataclass(frozen=True)
class Contents:
    """What a format's reader gives."""

    format: str
    tensors: tuple[TensorFound, ...]
    metadata: dict[str, str]
    notes: tuple[str, ...] = ()


class Inspection(Record):
    """`manifest` is None where there is none; `changes` are the files that are not as it lists them."""

    path: str
    format: str
    size_bytes: int
    sha256: dict[str, str]  # by file name
    tensors: tuple[TensorFound, ...]
    metadata: dict[str, str]
    notes: tuple[str, ...] = ()
    manifest: dict[str, str] | None = None
    changes: tuple[str, ...] = ()

    @property
    def intact(self) -> bool:
        return not self.changes

    @property
    def groups(self) -> list[Group]:
        """Tensors by role and dtype, the largest first."""
        together: dict[tuple[Role, str], list[TensorFound]] = {}
        for tensor in self.tensors:
            together.setdefault((tensor.role, tensor.dtype), []).append(tensor)
        made = [_group(role, dtype, tensors) for (role, dtype), tensors in together.items()]
        return sorted(made, key=lambda g: -g.size_bytes)

    def dtype_of(self, role: Role) -> str:
        """How the tensors of a role are stored, e.g. of the head; "tied to the embedding" where it is."""
        found = sorted({tensor.dtype for tensor in self.tensors if tensor.role == role})
        if not found and role == "head" and any(tensor.shared for tensor in self.tensors):
            return "tied to the embedding"
        return ", ".join(found) or "none in the file"


def _group(role: Role, dtype: str, tensors: Sequence[TensorFound]) -> Group:
    return Group(
        role=role,
        dtype=dtype,
        tensors=len(tensors),
        weights=sum(t.weights for t in tensors),
        size_bytes=sum(t.size_bytes for t in tensors),
    )


def shortened(value: object) -> str:
    """A metadata value on one line, cut where it is long."""
    text = " ".join(str(value).split())
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}… ({len(text)} characters)"
