"""A traced model as JSON: the graph's nodes name their parameters, so the file is small and holds no weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lilliput.model import DecoderConfig, Node, Signature, TensorInfo, TracedModel


def save(traced: TracedModel, path: Path) -> None:
    """Write one JSON file; the same graph gives the same bytes."""
    path.write_text(json.dumps(asdict(traced), indent=1, sort_keys=True) + "\n")


def load(path: Path) -> TracedModel:
    """Read what `save` wrote."""
    tree = json.loads(path.read_text())
    return TracedModel(DecoderConfig(**tree["config"]), tuple(_signature(s) for s in tree["signatures"]))


def _signature(tree: Any) -> Signature:
    nodes = tuple(Node(n["op"], tuple(n["inputs"]), tuple(n["outputs"]), n["attributes"]) for n in tree["nodes"])
    return Signature(tree["name"], _infos(tree["inputs"]), _infos(tree["outputs"]), nodes)


def _infos(items: Any) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(i["name"], i["dtype"], tuple(i["shape"])) for i in items)
