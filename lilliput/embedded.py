"""What a model file says of its own making: the text that an exporter embeds under PROVENANCE, read by format.

    .gguf      a string among the key-value pairs
    .onnx      an entry of metadata_props
    .tflite    a named metadata buffer (schema.fbs: Model.metadata)

The text is a JSON object of strings. It is part of the file's bytes, so it holds nothing that two runs of one recipe
could write differently: no time, no figure, no folder. Those are in the manifest beside the file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from lilliput.artifact import PROVENANCE
from lilliput.errors import ArtifactError, MissingPackageError


def provenance(path: Path) -> dict[str, str] | None:
    """What is embedded in a file; None where nothing is, or its format is not one of those above.

    Raises ArtifactError where the file cannot be read, MissingPackageError without its format's reader.
    """
    reader = READERS.get(path.suffix)
    if reader is None:
        return None
    try:
        text = reader(path)
        found = None if text is None else json.loads(text)
    except MissingPackageError:
        raise
    except Exception as error:  # each format's library raises kinds of its own for a damaged file
        raise ArtifactError(f"{path}: cannot be read ({type(error).__name__}): it is damaged, run again") from error
    if found is not None and not (isinstance(found, dict) and all(isinstance(v, str) for v in found.values())):
        raise ArtifactError(f"{path}: {PROVENANCE} is not an object of strings: Lilliput did not write it")
    return found


def _gguf(path: Path) -> str | None:
    try:
        import gguf
    except ModuleNotFoundError as missing:
        raise MissingPackageError("gguf", "llamacpp", f"reading {path.name}") from missing
    field = gguf.GGUFReader(path).get_field(PROVENANCE)
    return None if field is None else str(field.contents())


def _onnx(path: Path) -> str | None:
    try:
        import onnx
    except ModuleNotFoundError as missing:
        raise MissingPackageError("onnx", "onnx", f"reading {path.name}") from missing
    model = onnx.load(path, load_external_data=False)
    return next((str(entry.value) for entry in model.metadata_props if entry.key == PROVENANCE), None)


def _tflite(path: Path) -> str | None:
    try:
        from ai_edge_litert import schema_py_generated as schema
    except ModuleNotFoundError as missing:
        raise MissingPackageError("ai_edge_litert", "litert", f"reading {path.name}") from missing
    model = schema.Model.GetRootAs(path.read_bytes(), 0)
    for entry in (model.Metadata(i) for i in range(model.MetadataLength())):
        if entry.Name() == PROVENANCE.encode():
            return str(model.Buffers(entry.Buffer()).DataAsNumpy().tobytes().decode())
    return None


READERS: dict[str, Callable[[Path], str | None]] = {".gguf": _gguf, ".onnx": _onnx, ".tflite": _tflite}
