"""Coverage by the best that is here: QNN's compiler where its extra is installed, else the static check, named so."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from lilliput.errors import ArtifactError
from targets.npu import Coverage, Soc, qnn, static_check

MAIN_FILE = "model.onnx"


def coverage(path: Path, chip: Soc) -> Coverage:
    """Of a file, or of a folder's model.onnx. Raises ArtifactError where there is none that can be read."""
    file = _file(path)
    if importlib.util.find_spec("onnxruntime_qnn") is None:
        return static_check.check(file, chip)
    return qnn.place(file, chip)


def compiled(path: Path, chip: Soc, folder: Path) -> tuple[Path, ...]:
    """The context binary's files, written into `folder`. Raises ArtifactError naming nodes that are not the NPU's."""
    folder.mkdir(parents=True, exist_ok=True)
    return qnn.compile_context(_file(path), chip, folder)


def described(found: Coverage, floor: float) -> str:
    """The coverage, its operators, and the gate's verdict."""
    operators = ", ".join(f"{name} {count}" for name, count in found.operators.items())
    verdict = "PASS" if found.share >= floor else "FAIL"
    return (
        f"{found.sentence()}\non the NPU: {operators or 'nothing'}\n{verdict}: {found.share:.1%}, at least {floor:.0%}"
    )


def _file(path: Path) -> Path:
    file = path / MAIN_FILE if path.is_dir() else path
    if not file.is_file():
        raise ArtifactError(f"{file}: does not exist, wanted an ONNX file in QDQ form")
    return file
