"""LiteRT on this machine's CPU: CompiledModel with XNNPACK, the KV cache updated in place.

The caches are one set of buffers, bound as inputs and as outputs of both signatures: the update operators then
write into them instead of copying them (62 → 80 tokens/s where it was first measured).

A prompt is prefilled in chunks of the fixed lengths that the file has signatures for, all but its last token; the
last one is decoded, for only `decode` has logits (LiteRT-LM works the same way). Each chunk's length is the one that
is cheapest per token of what is left; where a remainder is padded to it, the padding's keys and values land in
cache slots after the prompt, where the mask hides them from every query until the tokens that belong there
overwrite them. No chunk runs past the end of the cache, padding included: the update would slide back over
valid slots.

XNNPACK packs each signature's weights anew, unless it has a weight cache: with one in memory, both
signatures share the packed weights (SmolLM2-135M at int8, one run: 274 instead of 475 MB at its peak).

`exact` needs no flag: an artifact exported exact has float32 matrices, which XNNPACK computes in float32
(its fp16 mode is off by default).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from lilliput.artifact import Artifact
from lilliput.errors import ArtifactError, InputError
from lilliput.grid import Float

MASKED = np.float32(-0.7 * np.finfo(np.float32).max)  # LiteRT-LM's own number: far below any score, and no infinity
IN_MEMORY = ":memory"  # XNNPACK's name for a cache of packed weights that is no file


def cost_steps(length: int) -> float:
    """What a call of `length` tokens costs, in decode steps: SmolLM2-135M took 3.2 for 16 and 14.2 for 128."""
    return 1.0 if length == 1 else 1.6 + length / 10


def chunk_length(lengths: Sequence[int], left: int, room: int) -> int:
    """The cheapest per token of call lengths 1 and `lengths`, for `left` tokens and `room` positions in the cache."""
    fitting = [1, *(n for n in lengths if n <= room)]
    return min(fitting, key=lambda n: (cost_steps(n) / min(n, left), n))


class Runtime:
    exporters: ClassVar[tuple[str, ...]] = ("litert_int8",)
    packages: ClassVar[tuple[str, ...]] = ("ai_edge_litert",)
    extra: ClassVar[str] = "litert"

    def open(self, artifact: Artifact, threads: int, *, exact: bool = False) -> LitertSession:
        return LitertSession(artifact, threads)

    def versions(self) -> dict[str, str]:
        return {"ai-edge-litert": version("ai-edge-litert")}


class LitertSession:
    """A loaded file with one KV cache."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        self._model = compiled_model(artifact, threads)
        self._context, self._position = artifact.context, 0
        details = self._model.get_input_tensor_details("decode")
        self._caches = {
            n: self._zeros("decode", n, d["shape"]) for n, d in details.items() if n.startswith("kv_cache_")
        }
        self._logits = self._model.create_output_buffer_by_name("decode", "logits")
        self._vocab_size = self._model.get_output_tensor_details("decode")["logits"]["shape"][-1]
        self._decode = self._call("decode")
        names = (name.partition("prefill_")[2] for name in self._model.get_signature_list())
        self._prefills = {int(n): self._call(f"prefill_{n}") for n in names if n}

    def reset(self) -> None:
        self._position = 0

    def prefill(self, tokens: Sequence[int]) -> Float:
        if not tokens:
            raise InputError("an empty prompt cannot be prefilled: give at least 1 token")
        self._check_room(len(tokens))
        body = list(tokens[:-1])
        while body:
            length = chunk_length(list(self._prefills), len(body), self._context - self._position)
            self._append(body[:length], length)
            body = body[length:]
        return self.decode(tokens[-1])

    def decode(self, token: int) -> Float:
        self._check_room(1)
        self._append([token], 1)
        logits: Float = self._logits.read(self._vocab_size, np.float32)
        return logits

    def close(self) -> None:
        self._decode, self._prefills = None, {}  # type: ignore[assignment]
        self._caches, self._logits = {}, None
        self._model.close()

    def _check_room(self, count: int) -> None:
        if self._position + count > self._context:
            raise InputError(
                f"{count} tokens at position {self._position} do not fit a cache of {self._context}: "
                "reset the session, or export with a larger context"
            )

    def _append(self, tokens: list[int], length: int) -> None:
        """Run the call of `length` tokens over `tokens`, padded to it."""
        padded = np.zeros(length, dtype=np.int32)
        padded[: len(tokens)] = tokens
        self._run(self._decode if length == 1 else self._prefills[length], padded)
        self._position += len(tokens)

    def _run(self, call: Call, tokens: npt.NDArray[np.int32]) -> None:
        positions = np.arange(self._position, self._position + len(tokens), dtype=np.int32)
        visible = np.arange(self._context) <= positions[:, None]  # (T, C)
        call.tokens.write(tokens)
        call.positions.write(positions)
        call.mask.write(np.where(visible, np.float32(0), MASKED))
        self._model.run_by_index(call.index, call.inputs, call.outputs)

    def _call(self, signature: str) -> Call:
        names = self._model.get_signature_list()[signature]
        own = {n: self._model.create_input_buffer_by_name(signature, n) for n in ("tokens", "input_pos", "mask")}
        inputs, outputs = own | self._caches, {"logits": self._logits} | self._caches
        return Call(
            self._model.get_signature_index(signature),
            own["tokens"],
            own["input_pos"],
            own["mask"],
            [inputs[n] for n in names["inputs"]],
            [outputs[n] for n in names["outputs"]],
        )

    def _zeros(self, signature: str, name: str, shape: Sequence[int]) -> Any:
        """A cache buffer; zeroed, for a masked slot that held NaN would still spoil the sum."""
        buffer = self._model.create_input_buffer_by_name(signature, name)
        buffer.write(np.zeros(shape, dtype=np.float32))
        return buffer


@dataclass(frozen=True, eq=False)
class Call:
    """One signature with its buffers bound: its own three, and the caches as inputs and outputs."""

    index: int
    tokens: Any
    positions: Any
    mask: Any
    inputs: list[Any]
    outputs: list[Any]


def compiled_model(artifact: Artifact, threads: int) -> Any:
    from ai_edge_litert.compiled_model import CompiledModel
    from ai_edge_litert.options import CpuOptions, Options

    if not artifact.path.is_file():
        raise ArtifactError(f"{artifact.path}: no such file, wanted the .tflite of a litert_int8 artifact")
    cpu = CpuOptions(num_threads=threads, xnnpack_weight_cache_path=IN_MEMORY)
    try:
        return CompiledModel.from_file(str(artifact.path), options=Options(cpu_options=cpu))
    except Exception as error:  # the runtime's bindings raise bare RuntimeErrors
        raise ArtifactError(f"{artifact.path}: LiteRT does not open it ({error})") from error
