"""Stage results, addressed by content, published atomically.

    <root>/<stage>/<key>/             the result, with ENTRY last of all: every file's size and sha256
    <root>/<stage>/<key>.<hex>.tmp/   a result that is being written
    <root>/<stage>/<key>.unfinished/  checkpoints of a long one, which outlive a kill
    <root>/locks/<key>                held (flock) by the process that writes the key

The key is the sha256 of stage, code, inputs' keys and options, so an entry never changes: it is there, whole, or it is
not. A result is written in a folder beside, synced to disk, and renamed. The kernel drops a killed process's lock,
so a writing folder whose lock can be taken has no owner and is removed. Two runs at once wait for each other, per key.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256 as new_sha256
from pathlib import Path

from lilliput.artifact import sha256
from lilliput.errors import LilliputError, MissingError, OutputError

ENTRY = "entry.json"
KEEP_DAYS = 30
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)


def default_root() -> Path:
    """LILLIPUT_CACHE, or the platform's cache folder."""
    if chosen := os.environ.get("LILLIPUT_CACHE"):
        return Path(chosen)
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "lilliput"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lilliput"


def key_of(stage: str, code: str, inputs: Mapping[str, str], options: Mapping[str, object]) -> str:
    """The address of a stage's result: hex sha256 of canonical JSON. `inputs` are the keys of what it reads."""
    text = json.dumps([stage, code, dict(inputs), dict(options)], sort_keys=True, separators=(",", ":"))
    return new_sha256(text.encode()).hexdigest()


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full or read-only disk under `folder` into one line, whichever library met it."""
    try:
        yield
    except LilliputError:
        raise
    except Exception as error:
        number, name = _errno(error), getattr(error, "filename", None) or folder
        if number in FULL:
            raise MissingError(
                f"{name}: the disk is full; free some space, or use another disk "
                f"(--out for artifacts, LILLIPUT_CACHE for stage results); finished stages are kept"
            ) from error
        if number in REFUSED:
            raise OutputError(
                f"{name}: cannot be written ({os.strerror(number)}); choose a folder that can "
                f"(--out for artifacts, LILLIPUT_CACHE for stage results)"
            ) from error
        raise


def _errno(error: Exception) -> int:
    """The system's error number; Rust libraries (safetensors) have it in their text alone; 0 where there is none."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


@dataclass(frozen=True)
class Store:
    """The stage results below one folder."""

    root: Path

    def folder(self, stage: str, key: str) -> Path:
        return self.root / stage / key

    def find(self, stage: str, key: str) -> Path | None:
        """The entry's folder if it is whole: all files there, of the size that was written."""
        folder = self.folder(stage, key)
        listed = _read_listing(folder)
        if listed is None or any(_size(folder / name) != size for name, (size, _) in listed.items()):
            return None
        return folder

    def verify(self, stage: str, key: str) -> bool:
        """Whether every file of the entry has the bytes that were written. Reads them all."""
        folder = self.find(stage, key)
        listed = _read_listing(folder) if folder else None
        return folder is not None and all(sha256(folder / n) == digest for n, (_, digest) in (listed or {}).items())

    def hashes(self, stage: str, key: str) -> dict[str, str]:
        """The sha256 of each file of an entry by its path, as written."""
        return {name: digest for name, (_, digest) in (_read_listing(self.folder(stage, key)) or {}).items()}

    def build(self, stage: str, key: str, write: Callable[[Path], None], *, fresh: bool = False) -> tuple[Path, bool]:
        """The entry's folder, and whether it was there: `write` fills a new folder where it was not, or was damaged.

        Raises MissingError for a full disk, OutputError for a read-only one; nothing half-written stays.
        """
        with disk_errors(self.root), self._locked(key):
            found = self.find(stage, key)
            if found is not None and not fresh:
                return found, True
            return self._write(stage, key, write), False

    def _write(self, stage: str, key: str, write: Callable[[Path], None]) -> Path:
        folder = self.folder(stage, key)
        temporary = folder.with_name(f"{key}.{secrets.token_hex(4)}.tmp")
        temporary.mkdir(parents=True)
        try:
            write(temporary)
            _seal(temporary)
            _replace(temporary, folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        return folder

    @contextmanager
    def _locked(self, key: str) -> Iterator[None]:
        path = self.root / "locks" / key
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def use(self, stage: str, key: str) -> None:
        """Note that an entry is in use today: `expire` keeps it."""
        with suppress(OSError):
            os.utime(self.folder(stage, key) / ENTRY)

    def expire(self, days: float = KEEP_DAYS) -> None:
        """Remove entries that no run has used for `days`: those of older code, models and recipes."""
        oldest = time.time() - days * 86400
        for listing in self.root.glob(f"*/*/{ENTRY}"):
            key = listing.parent.name
            with suppress(OSError), (self.root / "locks" / key).open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if listing.stat().st_mtime < oldest:
                    listing.unlink()  # no entry any more, whatever is still there
                    shutil.rmtree(listing.parent, ignore_errors=True)

        for folder in self.root.glob("*/*.unfinished"):
            with suppress(OSError), (self.root / "locks" / folder.name.partition(".")[0]).open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if folder.stat().st_mtime < oldest:
                    shutil.rmtree(folder, ignore_errors=True)

    def clean(self) -> None:
        """Remove what killed runs left: writing folders whose key nobody holds."""
        for folder in self.root.glob("*/*.tmp"):
            with suppress(OSError), (self.root / "locks" / folder.name.partition(".")[0]).open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _read_listing(folder: Path) -> dict[str, tuple[int, str]] | None:
    try:
        listed = json.loads((folder / ENTRY).read_text())
        return {name: (int(size), str(digest)) for name, (size, digest) in listed.items()}
    except (OSError, ValueError, AttributeError, TypeError):
        return None


def _seal(folder: Path) -> None:
    """Sync every file to disk, then write the listing."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    listed = {p.relative_to(folder).as_posix(): (p.stat().st_size, sha256(p)) for p in files}
    for path in files:
        _sync(path)
    (folder / ENTRY).write_text(json.dumps(listed, indent=1) + "\n")
    _sync(folder / ENTRY)
    _sync(folder)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def unfinished(folder: Path) -> Iterator[Path]:
    """A folder that outlives a kill, for the checkpoints of a result that is being written into `folder`.

    The next process that writes the same key finds it; it is removed when the result is there.
    """
    kept = folder.with_name(f"{folder.name.partition('.')[0]}.unfinished")
    kept.mkdir(parents=True, exist_ok=True)
    yield kept
    shutil.rmtree(kept, ignore_errors=True)


def publish(source: Path, destination: Path) -> None:
    """Copy the files of folder `source` to a new folder `destination`, atomically; an older one is replaced.

    Files are copied, not linked: what a user does to an artifact must not reach the store.
    """
    with disk_errors(destination):
        destination.parent.mkdir(parents=True, exist_ok=True)
        for left in destination.parent.glob(f".{destination.name}.*.tmp"):  # of a killed run
            shutil.rmtree(left, ignore_errors=True)
        temporary = destination.with_name(f".{destination.name}.{secrets.token_hex(4)}.tmp")
        try:
            _copy(source, temporary)
            _replace(temporary, destination)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _copy(source: Path, destination: Path) -> None:
    """Every file but the listing, one by one: an OSError keeps its number."""
    destination.mkdir()
    for path in sorted(p for p in source.rglob("*") if p.is_file() and p != source / ENTRY):
        copy = destination / path.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)


def _replace(new: Path, folder: Path) -> None:
    """Rename `new` to `folder`; what was there is moved away first, then removed."""
    if folder.exists():
        discarded = folder.with_name(f"{new.name.removesuffix('.tmp')}.old.tmp")
        folder.rename(discarded)
        shutil.rmtree(discarded, ignore_errors=True)
    new.rename(folder)
    _sync(folder.parent)
