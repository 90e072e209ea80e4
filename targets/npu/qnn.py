"""ONNX Runtime's QNN provider (onnxruntime-qnn, a plugin): sessions on the HTP, what it takes, and context binaries.

    place      a session that may fall back lists which provider got which node; nothing is run
    open       strict: session.disable_cpu_ep_fallback, so that nothing else computes a node
    compile    the same session writes what the NPU loads: model_ctx.onnx, one EPContext node, and its binary beside it

The provider leaves quantizing a graph's inputs and outputs to the CPU unless told otherwise
(offload_graph_io_quantization); here the NPU does that too. Without soc_model and htp_arch its x86 build emulates an
early architecture, whose products of 16-bit activations are coarser: a SoC is always named.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lilliput.errors import ArtifactError, MeasurementError, MissingPackageError
from targets.npu import Coverage, Soc

if TYPE_CHECKING:
    from onnxruntime import InferenceSession, SessionOptions

PROVIDER = "QNNExecutionProvider"
CONTEXT_FILE = "model_ctx.onnx"
NAMED = 8  # nodes that a message names
ERRORS_ONLY = 3


@cache
def _devices() -> list[Any]:
    """The provider's devices; its library is registered once a process."""
    try:
        import onnxruntime as ort
        import onnxruntime_qnn as qnn
    except ModuleNotFoundError as error:
        raise MissingPackageError(error.name or "onnxruntime_qnn", "qnn", "the NPU's compiler") from error
    try:
        ort.register_execution_provider_library(qnn.get_ep_name(), qnn.get_library_path())
    except Exception as error:  # onnxruntime raises its own kinds: a library that this system cannot load
        raise MeasurementError(
            f"onnxruntime-qnn does not load here ({error}): it needs Linux x86-64, glibc 2.35"
        ) from error
    found = [device for device in ort.get_ep_devices() if device.ep_name == PROVIDER]
    if not found:
        raise MeasurementError("onnxruntime-qnn offers no device here: reinstall the extra `qnn`")
    return found


def _options(chip: Soc, strict: bool, context: Path | None = None) -> SessionOptions:
    devices = _devices()  # first: it says what is missing
    import onnxruntime as ort
    import onnxruntime_qnn as qnn

    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.add_session_config_entry("session.disable_cpu_ep_fallback", str(int(strict)))
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    if context is not None:
        options.add_session_config_entry("ep.context_enable", "1")
        options.add_session_config_entry("ep.context_file_path", str(context))
        options.add_session_config_entry("ep.context_embed_mode", "0")
    provider = {
        "backend_path": str(Path(qnn.LIB_DIR_FULL_PATH) / "libQnnHtp.so"),
        "soc_model": str(chip.model),
        "htp_arch": str(chip.htp_arch),
        "offload_graph_io_quantization": "0",
    }
    options.add_provider_for_devices(devices[:1], provider)
    return options


def _session(path: Path, options: SessionOptions) -> InferenceSession:
    import onnxruntime as ort

    try:
        with _stdout_kept():
            return ort.InferenceSession(str(path), options)
    except Exception as error:  # onnxruntime raises its own kinds, one per status code
        raise ArtifactError(f"{path}: QNN cannot prepare it for the NPU ({error})") from error


@contextmanager
def _stdout_kept() -> Iterator[None]:
    """What QNN's libraries print goes to stderr: stdout carries results."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def place(path: Path, chip: Soc) -> Coverage:
    """Which nodes the NPU takes. Raises ArtifactError for a file that is none or that the compiler fails on."""
    session = _session(path, _options(chip, strict=False))
    taken: Counter[str] = Counter()
    elsewhere: list[str] = []
    for part in session.get_provider_graph_assignment_info():
        for node in part.get_nodes():
            if part.ep_name == PROVIDER:
                taken[node.op_type] += 1
            else:
                elsewhere.append(f"{node.name} ({node.op_type})")
    on_npu = taken.total()
    return Coverage(
        method="compiled", soc=chip.name, nodes=on_npu + len(elsewhere), on_npu=on_npu,
        operators=dict(sorted(taken.items())), elsewhere=tuple(elsewhere),
    )  # fmt: skip


def check(coverage: Coverage, path: Path) -> None:
    """Raise ArtifactError naming the nodes that would run elsewhere."""
    if coverage.elsewhere:
        more = len(coverage.elsewhere) - NAMED
        raise ArtifactError(
            f"{path}: the NPU of {coverage.soc} does not take {', '.join(coverage.elsewhere[:NAMED])}"
            f"{f' and {more} more' if more > 0 else ''}, {coverage.on_npu} of {coverage.nodes} nodes would run there: "
            "take the node out of the model, or choose a target that runs it"
        )


def open_strict(path: Path, chip: Soc) -> InferenceSession:
    """A session in which the NPU computes every node. Raises ArtifactError naming those that it does not take."""
    check(place(path, chip), path)
    return _session(path, _options(chip, strict=True))


def compile_context(path: Path, chip: Soc, folder: Path) -> tuple[Path, ...]:
    """Write the context binary of `path` for the chip into `folder` (exists): the wrapper model and what it names.

    Raises ArtifactError naming the nodes that the NPU does not take, or where nothing was written.
    """
    check(place(path, chip), path)
    context = folder / CONTEXT_FILE
    _session(path, _options(chip, strict=True, context=context))
    written = tuple(sorted(folder.glob(f"{context.stem}*")))
    if context not in written or len(written) < 2:
        raise ArtifactError(f"{path}: QNN wrote no context binary for {chip.name}, seen {[p.name for p in written]}")
    return written
