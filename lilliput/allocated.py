"""What a byte budget gave to each matrix of one target: its grid, its bytes, and the loss that was predicted for it.

`Allocation` is what calibration decides and report.json holds, matrix by matrix; `classes` is its table for people.
"""

from __future__ import annotations

from collections.abc import Iterator

from lilliput.model import role_of
from lilliput.results import Record


class Choice(Record):
    """One matrix. `loss` is the predicted KLD, nats a token, of its rounding alone."""

    name: str
    grid: str
    weights: int
    size_bytes: int
    loss: float


class Finalist(Record):
    """An allocation that was solved and measured on samples that its solve had not seen."""

    tables: str  # embedding on int4-b32
    loss: float  # predicted
    kld: float  # measured


class Allocation(Record):
    """All matrices of one target. `file_bytes` is the size of a file with these grids, written and counted.

    `finalists` are those that predictions could not tell apart, this one among them; none where it had no rival.
    """

    target: str
    limit_bytes: int | None  # of the file; None: the budget was bits per weight
    file_bytes: int | None
    choices: tuple[Choice, ...]
    finalists: tuple[Finalist, ...] = ()

    @property
    def tables(self) -> str:
        """Where embedding and head went."""
        tables = (choice for choice in self.choices if role_of(choice.name) != "linear")
        return ", ".join(f"{choice.name} on {choice.grid}" for choice in tables)

    @property
    def loss(self) -> float:
        return sum(choice.loss for choice in self.choices)

    @property
    def bits_per_weight(self) -> float:
        return 8 * sum(choice.size_bytes for choice in self.choices) / sum(choice.weights for choice in self.choices)


class ChoiceClass(Record):
    """The matrices of one kind that got one grid."""

    kind: str  # mlp.down, embedding
    grid: str
    layers: tuple[int, ...]  # empty for embedding and head
    weights: int
    size_bytes: int
    loss: float


def classes(allocation: Allocation) -> Iterator[ChoiceClass]:
    """By kind, in the order of computation, then from the fewest bytes a weight to the most."""
    kinds = list(dict.fromkeys(kind_of(choice.name) for choice in allocation.choices))
    groups: dict[tuple[str, str], list[Choice]] = {}
    for choice in allocation.choices:
        groups.setdefault((kind_of(choice.name), choice.grid), []).append(choice)
    for (kind, grid), found in sorted(
        groups.items(), key=lambda g: (kinds.index(g[0][0]), g[1][0].size_bytes / g[1][0].weights)
    ):
        yield ChoiceClass(
            kind=kind,
            grid=grid,
            layers=tuple(int(c.name.split(".")[1]) for c in found if role_of(c.name) == "linear"),
            weights=sum(c.weights for c in found),
            size_bytes=sum(c.size_bytes for c in found),
            loss=sum(c.loss for c in found),
        )


def kind_of(name: str) -> str:
    """A matrix's name without its layer: layers.3.mlp.down is mlp.down."""
    return name.split(".", 2)[2] if role_of(name) == "linear" else name


def ranges(layers: tuple[int, ...]) -> str:
    """0, 1, 2, 5 → 0-2, 5."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
