"""Stage 1: a model from where it is, in the decoder's own terms, with its tokenizer and its decoder proven.

    path/to/folder                a Hugging Face folder (safetensors), float or quantized (lilliput.sources.quantized)
    path/to/model.gguf            a GGUF file
    package:NAME/FILE             a file or folder inside an installed package
    organisation/name             a hub id, downloaded by huggingface_hub (only the files that are needed)

`load` writes the stage's folder (lilliput/sources/stage.py) whole or not at all; `open_stage` opens it again.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lilliput.errors import MissingError, OutputError, SourceError
from lilliput.model import SourceModel
from lilliput.progress import Progress, silent
from lilliput.proof import prove
from lilliput.sources import Original, package_file, stage
from lilliput.sources.gguf_file import open_gguf
from lilliput.sources.hf_folder import open_folder
from lilliput.sources.stage import open_stage

__all__ = ["load", "open_original", "open_stage", "prove", "resolve"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_PATTERNS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "tokenizer.model",
    "merges.txt",
    "*.jinja",
    "README.md",
)
HUB_PICKLE_PATTERNS = ("pytorch_model*.bin",)
FORMS = "a Hugging Face folder, a .gguf file, package:NAME/FILE, or a hub id organisation/name"


def load(
    source: str, folder: Path, *, allow_pickle: bool = False, allow_remote_code: bool = False,
    progress: Progress = silent, proof: bool = True,
) -> SourceModel:  # fmt: skip
    """Read `source` into `folder` (absent or empty), prove tokenizer and decoder, and return the model.

    `progress` counts bytes of weights. Raises SourceError for a source that is missing, damaged, not supported or
    not proven, MissingError for what this machine lacks; nothing is left in `folder` then.
    """
    path = resolve(source, allow_pickle=allow_pickle)
    original = open_original(path, allow_pickle=allow_pickle, allow_remote_code=allow_remote_code)
    with _whole_or_not_at_all(folder):
        model = stage.write(original, source, folder, progress)
        if proof:
            tensors = original.dequantized()
            sentence = prove(model, path, allow_remote_code=allow_remote_code, dequantized=tensors)
            model = stage.record_proof(folder, sentence)
    return model


def resolve(source: str, *, allow_pickle: bool = False) -> Path:
    """The folder or file that `source` names; a hub id is downloaded into huggingface_hub's cache."""
    if source.startswith(package_file.PREFIX):
        return package_file.locate(source)
    path = Path(source).expanduser()
    if source.strip() and path.exists():
        return path
    if HUB_ID.fullmatch(source) and not source.endswith(".gguf"):
        return _download(source, allow_pickle)
    raise SourceError(f"source {source!r}: there is no such file or folder, wanted {FORMS}")


def open_original(path: Path, *, allow_pickle: bool = False, allow_remote_code: bool = False) -> Original:
    """Open a folder or file without reading its weights."""
    try:
        if path.is_dir():
            return open_folder(path, allow_pickle=allow_pickle, allow_remote_code=allow_remote_code)
        if path.suffix.lower() == ".gguf":
            return open_gguf(path)
    except OSError as error:
        raise SourceError(f"{error.filename or path}: cannot be read ({error.strerror or error})") from error
    raise SourceError(f"source {str(path)!r}: a file of type {path.suffix or '(none)'!r} is no model, wanted {FORMS}")


def _download(source: str, allow_pickle: bool) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    patterns = [*HUB_PATTERNS, *(HUB_PICKLE_PATTERNS if allow_pickle else ())]
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except (GatedRepoError, RepositoryNotFoundError) as error:
        raise SourceError(
            f"source {source!r}: no such file or folder here, and the hub does not give a model of that name "
            f"({type(error).__name__}): check the name, or log in if it is gated or private"
        ) from error
    except (
        Exception
    ) as error:  # requests, httpx and huggingface_hub each have their own for a network that is not there
        raise MissingError(
            f"source {source!r}: no such file or folder here, and the hub cannot be reached "
            f"({type(error).__name__}): give a local folder, or connect this machine"
        ) from error


@contextmanager
def _whole_or_not_at_all(folder: Path) -> Iterator[None]:
    """Make `folder` where it is absent; empty it again (and remove it, if made here) when the work fails."""
    made = not folder.exists()
    if not made and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder}: not an empty folder, wanted one to write the source into: choose another")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        if folder.is_dir():
            _empty(folder)
            if made:
                folder.rmdir()
        if isinstance(error, OSError):
            raise MissingError(
                f"{error.filename or folder}: {error.strerror or error}: free or choose a disk"
            ) from error
        raise


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
