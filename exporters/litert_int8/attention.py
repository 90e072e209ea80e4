"""Attention and its cache, for XNNPACK; the layouts and their reasons stand in lowering.py."""

from __future__ import annotations

import numpy as np

from exporters.litert_int8 import operators as op
from exporters.litert_int8.flatbuffer import Graph
from lilliput.grid import Float
from lilliput.model import DecoderConfig

HEADS_AND_STEPS = (0, 2, 1, 3)


def rotary_table(config: DecoderConfig, context: int) -> Float:
    """(C, 2 D) float32: cos twice, then -sin and sin, at every position."""
    from lilliput.decoder import rotary_tables

    cos, sin = (table.numpy() for table in rotary_tables(config, context))
    return np.concatenate([cos, cos, -sin, sin], axis=1)


class AttentionLowering:
    """What all attention nodes of one subgraph share: rotary factors and the write positions of the step."""

    def __init__(
        self, graph: Graph, config: DecoderConfig, steps: int, context: int, positions: int, mask: int
    ) -> None:
        self.graph, self.config, self.steps, self.context, self.mask = graph, config, steps, context, mask
        first = op.cut(graph, positions, 0, 0, 1, "int32")
        zero, zeros = op.ints(graph, [0]), op.ints(graph, [0, 0])
        self.start = op.concatenate(graph, [zeros, first, zero], 0, "int32")
        self.cos, self.sin = self._rotary(positions) if config.positions == "rope" else (-1, -1)

    def _rotary(self, positions: int) -> tuple[int, int]:
        """cos and signed sin of the step's positions, each (1, T, 1, D)."""
        g, dim = self.graph, self.config.head_dim
        table = g.constant("rope", rotary_table(self.config, self.context))
        both = op.reshape(g, op.lookup(g, positions, table), [1, self.steps, 1, 2 * dim])
        return op.cut(g, both, 3, 0, dim), op.cut(g, both, 3, dim, dim)

    def lower(self, qkv: int, caches: tuple[int, int], rotary: bool) -> tuple[int, int, int]:
        """qkv (1, T, (H + 2 K) D) and caches → attended (1, T, H D), keys and values after the step."""
        g, c = self.graph, self.config
        heads = op.reshape(g, qkv, [1, self.steps, c.num_heads + 2 * c.num_kv_heads, c.head_dim])
        turned = op.cut(g, heads, 2, 0, c.num_heads + c.num_kv_heads)
        turned = self._rotate(turned) if rotary else turned
        q = op.cut(g, turned, 2, 0, c.num_heads)
        q = op.binary(g, "MUL", q, op.scalar(g, c.head_dim**-0.5))
        k = op.cut(g, turned, 2, c.num_heads, c.num_kv_heads)
        v = op.cut(g, heads, 2, c.num_heads + c.num_kv_heads, c.num_kv_heads)
        keys = op.update_slice(g, caches[0], op.transpose(g, k, HEADS_AND_STEPS), self.start)
        values = op.update_slice(g, caches[1], op.transpose(g, v, HEADS_AND_STEPS), self.start)
        q = op.reshape(g, op.transpose(g, q, HEADS_AND_STEPS), [1, c.num_kv_heads, self._queries(), c.head_dim])
        return self._attend(q, keys, values), keys, values

    def _queries(self) -> int:
        """g T: queries of one KV head."""
        return self.config.num_heads // self.config.num_kv_heads * self.steps

    def _rotate(self, x: int) -> int:
        """x (1, T, heads, D) * cos + swapped halves * signed sin."""
        g, half = self.graph, self.config.head_dim // 2
        swapped = op.concatenate(g, [op.cut(g, x, 3, half, half), op.cut(g, x, 3, 0, half)], 3)
        return op.binary(g, "ADD", op.binary(g, "MUL", x, self.cos), op.binary(g, "MUL", swapped, self.sin))

    def _attend(self, q: int, keys: int, values: int) -> int:
        """q (1, K, g T, D) over keys and values (1, K, C, D) → (1, T, H D)."""
        g, c = self.graph, self.config
        by_group = [1, c.num_kv_heads, self._queries(), self.context]
        by_head = by_group if self.steps == 1 else [1, c.num_heads, self.steps, self.context]
        scores = op.reshape(g, op.matmul(g, q, keys, transposed=True), by_head)
        p = op.unary(g, "SOFTMAX", op.binary(g, "ADD", scores, self.mask), beta=1.0)
        y = op.matmul(g, op.reshape(g, p, by_group), values, transposed=False)
        y = op.reshape(g, y, [1, c.num_heads, self.steps, c.head_dim])
        return op.reshape(g, op.transpose(g, y, HEADS_AND_STEPS), [1, self.steps, c.num_heads * c.head_dim])
