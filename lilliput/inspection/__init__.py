"""What is in a model file or folder, ours or anyone's: bits per class of tensors, metadata, manifest kept or not.

    .gguf                  gguf_file.py          .tflite, .litertlm     tflite_file.py
    .onnx                  onnx_file.py          .safetensors           safetensors_file.py
    a folder with manifest.json    its model file, and every file's hash against the manifest
    a folder otherwise             the model file in it, or all its .safetensors
    one part of a split .gguf      the whole model, from all parts beside it

No weight is read: formats' headers say what is shown, but for a .tflite's delegation, which its runtime is asked. Sizes
are the bytes that are stored, scales and offsets included.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from lilliput import manifest
from lilliput.artifact import PART, sha256
from lilliput.errors import ArtifactError
from lilliput.inspection.found import Contents, Group, Inspection, TensorFound

__all__ = ["Contents", "Group", "Inspection", "TensorFound", "inspect", "model_files", "parts"]

MANY = 3  # file names that an error lists


def inspect(path: Path) -> Inspection:
    """Raises ArtifactError where `path` is no model file that is known, or is damaged."""
    if not path.exists():
        raise ArtifactError(f"{path}: does not exist, wanted a model file or a folder with one")
    if path.is_dir():
        return _folder(path)
    return _made(path, parts(path), _read(path))


def parts(file: Path) -> list[Path]:
    """The parts of a split model that lie beside this one, or the file alone."""
    if file.suffix != ".gguf" or not PART.search(file.stem):
        return [file]
    return sorted(p for p in file.parent.glob(f"{PART.sub('', file.stem)}-*-of-*.gguf") if PART.search(p.stem))


def model_files(path: Path) -> list[Path]:
    """The files that `inspect` reads: one, or the shards of a checkpoint. Raises ArtifactError where there is none."""
    if not path.is_dir():
        return [path]
    if (path / manifest.NAME).is_file():
        return [path / manifest.read(path).artifact.main_file]
    if (path / "report.json").is_file():
        targets = sorted(p.parent.name for p in path.glob(f"*/{manifest.NAME}"))
        raise ArtifactError(f"{path} is a whole run: inspect one of its targets, {', '.join(targets) or 'none here'}")
    files = _model_files(path)
    if len(files) > 1 and any(file.suffix != ".safetensors" for file in files) and files != parts(files[0]):
        names = ", ".join(f.name for f in files[:MANY])
        raise ArtifactError(f"{path} holds {len(files)} model files ({names}): inspect one of them")
    return files


def _folder(folder: Path) -> Inspection:
    if (folder / manifest.NAME).is_file():
        return _with_manifest(folder)
    files = model_files(folder)
    if files == parts(files[0]):
        return _made(folder, files, _read(files[0]))
    return _made(folder, files, _merge(_read(file) for file in files))


def _with_manifest(folder: Path) -> Inspection:
    described = manifest.read(folder)
    changed = tuple(manifest.changes(described, folder))
    file = folder / described.artifact.main_file
    if not file.is_file():
        raise ArtifactError(f"{folder}: {described.artifact.main_file} is missing, {manifest.NAME} lists it: run again")
    made = _made(folder, parts(file), _read_changed(file) if changed else _read(file))
    facts = {
        "model": described.name,
        "exporter": described.artifact.exporter,
        "source sha256": described.source.sha256,
        "verdict": described.result.verdict,
        "measured": f"{described.created} on {described.host.cpu}",
    }
    return made.model_copy(update={"manifest": facts, "changes": changed})


def _read_changed(file: Path) -> Contents:
    """What can still be read of a file that may be damaged."""
    try:
        return _read(file)
    except ArtifactError as error:
        return Contents("unreadable", (), {}, (str(error),))


def _model_files(folder: Path) -> list[Path]:
    """The model files of a folder; safetensors only where nothing else is there."""
    found = [p for p in sorted(folder.iterdir()) if p.suffix in READERS and p.is_file()]
    runtimes = [p for p in found if p.suffix != ".safetensors"]
    if not found:
        raise ArtifactError(f"{folder}: no model file in it, wanted one of {', '.join(sorted(READERS))}")
    return runtimes or found


def _merge(shards: Iterable[Contents]) -> Contents:
    """The shards of one model."""
    contents = list(shards)
    tensors = tuple(tensor for part in contents for tensor in part.tensors)
    metadata = {key: value for part in contents for key, value in part.metadata.items()}
    return Contents(contents[0].format, tensors, metadata, tuple(note for part in contents for note in part.notes))


def _made(path: Path, files: list[Path], contents: Contents) -> Inspection:
    return Inspection(
        path=str(path),
        format=contents.format,
        size_bytes=sum(f.stat().st_size for f in files),
        sha256={f.name: sha256(f) for f in files},
        tensors=contents.tensors,
        metadata=contents.metadata,
        notes=contents.notes,
    )


def _read(file: Path) -> Contents:
    reader = READERS.get(file.suffix)
    if reader is None:
        known = ", ".join(sorted(READERS))
        raise ArtifactError(
            f"{file}: {file.suffix or 'a file without suffix'} is no known model format, wanted {known}"
        )
    return reader(file)


def _gguf(file: Path) -> Contents:
    from lilliput.inspection.gguf_file import read

    return read(parts(file))


def _onnx(file: Path) -> Contents:
    from lilliput.inspection.onnx_file import read

    return read(file)


def _tflite(file: Path) -> Contents:
    from lilliput.inspection.tflite_file import read

    return read(file)


def _safetensors(file: Path) -> Contents:
    from lilliput.inspection.safetensors_file import read

    return read(file)


READERS: dict[str, Callable[[Path], Contents]] = {
    ".gguf": _gguf,
    ".litertlm": _tflite,
    ".onnx": _onnx,
    ".safetensors": _safetensors,
    ".tflite": _tflite,
}
