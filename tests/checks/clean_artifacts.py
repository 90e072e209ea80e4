"""Sound artifacts of several families, exporters and grids: the truth-check finds nothing in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import tiny_gguf
import tiny_models
import torch
from exporters_cases import rounded
from gguf import GGMLQuantizationType as Type

from lilliput import registry
from lilliput.artifact import Artifact
from lilliput.decoder import Decoder
from lilliput.grid import grid
from lilliput.model import QuantizedModel, SourceModel, TracedModel, role_of
from lilliput.trace import trace

CONTEXT, PREFILL = 48, 8
