"""Attention and its cache, for XNNPACK; the layouts and their reasons stand in lowering.py.

A window is a second mask: the least of the caller's and of a penalty wherever a slot lies `window` or more positions
before the query, computed once a step and window from input_pos. Soft caps divide the scores' scale by the cap.
"""

from __future__ import annotations

import numpy as np

from exporters.litert_int8 import operators as op
from exporters.litert_int8.flatbuffer import Graph
from lilliput.grid import Float
from lilliput.model import DecoderConfig, Node

HEADS_AND_STEPS = (0, 2, 1, 3)
MASKED = -1e38  # far below any score; no infinity, which a softmax of nothing else would turn to NaN


def rotary_tables(config: DecoderConfig, context: int) -> dict[str, Float]:
    """By the name of the cosines: (C, 2 D) float32, cos twice, then -sin and sin, at every position."""
    from lilliput.decoder import rope_tables

    tables = {name: table.numpy() for name, table in rope_tables(config, context).items()}
    return {
        name: np.concatenate([cos, cos, -tables[sine_of(name)], tables[sine_of(name)]], axis=1)
        for name, cos in tables.items()
        if name.endswith("cos")
    }


def sine_of(cosine: str) -> str:
    return f"{cosine.removesuffix('cos')}sin"


class AttentionLowering:
    """What all attention nodes of one subgraph share: rotary factors, masks and the write positions of the step."""

    def __init__(
        self, graph: Graph, config: DecoderConfig, steps: int, context: int, positions: int, mask: int
    ) -> None:
        self.graph, self.config, self.steps, self.context, self.mask = graph, config, steps, context, mask
        first = op.cut(graph, positions, 0, 0, 1, "int32")
        zero, zeros = op.ints(graph, [0]), op.ints(graph, [0, 0])
        self.start = op.concatenate(graph, [zeros, first, zero], 0, "int32")
        tables = rotary_tables(config, context)
        self.rotations = {name: self._rotary(name, table, positions) for name, table in tables.items()}
        self.masks = {window: self._windowed(window, positions) for window in sorted({0, *config.windows})}

    def _rotary(self, name: str, table: Float, positions: int) -> tuple[int, int]:
        """cos and signed sin of the step's positions, each (1, T, 1, D)."""
        g, dim = self.graph, self.config.head_dim
        rows = g.constant(name.removesuffix(".cos").removesuffix("_cos"), table)
        both = op.reshape(g, op.lookup(g, positions, rows), [1, self.steps, 1, 2 * dim])
        return op.cut(g, both, 3, 0, dim), op.cut(g, both, 3, dim, dim)

    def _windowed(self, window: int, positions: int) -> int:
        """The mask (1, 1, T, C) of layers with that window."""
        g = self.graph
        if not window:
            return self.mask
        at = op.reshape(g, op.cast(g, positions), [1, 1, self.steps, 1])
        slots = g.constant("slots", np.arange(self.context, dtype=np.float32).reshape(1, 1, 1, -1))
        beyond = op.binary(g, "SUB", op.binary(g, "SUB", at, slots), op.scalar(g, float(window - 1)))
        outside = op.binary(g, "MINIMUM", op.binary(g, "MAXIMUM", beyond, op.scalar(g, 0.0)), op.scalar(g, 1.0))
        return op.binary(g, "MINIMUM", self.mask, op.binary(g, "MUL", outside, op.scalar(g, MASKED)))

    def lower(self, node: Node, turned: int, v: int, caches: tuple[int, int]) -> tuple[int, int, int]:
        """q and k heads (1, T, H + K, D), v (1, T, K, D), caches → attended (1, T, H D), keys and values after it."""
        g, c = self.graph, self.config
        turned = self._rotate(turned, *self.rotations[node.inputs[6]]) if len(node.inputs) > 6 else turned
        scale, softcap = float(node.attributes["scale"]), float(node.attributes["softcap"])
        q = op.cut(g, turned, 2, 0, c.num_heads)
        q = op.binary(g, "MUL", q, op.scalar(g, scale / softcap if softcap else scale))
        k = op.cut(g, turned, 2, c.num_heads, c.num_kv_heads)
        keys = op.update_slice(g, caches[0], op.transpose(g, k, HEADS_AND_STEPS), self.start)
        values = op.update_slice(g, caches[1], op.transpose(g, v, HEADS_AND_STEPS), self.start)
        q = op.reshape(g, op.transpose(g, q, HEADS_AND_STEPS), [1, c.num_kv_heads, self._queries(), c.head_dim])
        mask = self.masks[int(node.attributes["window"])]
        return self._attend(q, keys, values, mask, softcap), keys, values

    def _queries(self) -> int:
        """g T: queries of one KV head."""
        return self.config.num_heads // self.config.num_kv_heads * self.steps

    def _rotate(self, x: int, cos: int, sin: int) -> int:
        """x (1, T, heads, D) * cos + swapped halves * signed sin."""
        g, half = self.graph, self.config.head_dim // 2
        swapped = op.concatenate(g, [op.cut(g, x, 3, half, half), op.cut(g, x, 3, 0, half)], 3)
        return op.binary(g, "ADD", op.binary(g, "MUL", x, cos), op.binary(g, "MUL", swapped, sin))

    def _attend(self, q: int, keys: int, values: int, mask: int, softcap: float) -> int:
        """q (1, K, g T, D) over keys and values (1, K, C, D) → (1, T, H D)."""
        g, c = self.graph, self.config
        by_group = [1, c.num_kv_heads, self._queries(), self.context]
        by_head = by_group if self.steps == 1 else [1, c.num_heads, self.steps, self.context]
        scores = op.reshape(g, op.matmul(g, q, keys, transposed=True), by_head)
        if softcap:
            scores = op.binary(g, "MUL", op.unary(g, "TANH", scores), op.scalar(g, softcap))
        p = op.unary(g, "SOFTMAX", op.binary(g, "ADD", scores, mask), beta=1.0)
        y = op.matmul(g, op.reshape(g, p, by_group), values, transposed=False)
        y = op.reshape(g, y, [1, c.num_heads, self.steps, c.head_dim])
        return op.reshape(g, op.transpose(g, y, HEADS_AND_STEPS), [1, self.steps, c.num_heads * c.head_dim])
