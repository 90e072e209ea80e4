"""The store: whole entries or none, whoever is killed, waits, or runs out of disk."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lilliput import store as stores
from lilliput.errors import MissingError, OutputError
from lilliput.store import ENTRY, Store, key_of, publish

KEY = "k" * 64


def writes(text: str = "one") -> stores.Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "part").mkdir()
        (folder / "part" / "a.bin").write_text(text)
        (folder / "b.bin").write_text(text * 2)

    return write


def never(folder: Path) -> None:
    raise AssertionError("a finished stage was done again")


def leftovers(store: Store) -> list[str]:
    return [p.name for p in store.root.glob("*/*.tmp")]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_keys_differ_by_stage_code_inputs_and_options_and_by_nothing_else() -> None:
    base = key_of("export", "code", {"a": "1", "b": "2"}, {"x": 1, "y": 2})
    assert base == key_of("export", "code", {"b": "2", "a": "1"}, {"y": 2, "x": 1})
    others = [
        key_of("trace", "code", {"a": "1", "b": "2"}, {"x": 1, "y": 2}),
        key_of("export", "edoc", {"a": "1", "b": "2"}, {"x": 1, "y": 2}),
        key_of("export", "code", {"a": "2", "b": "1"}, {"x": 1, "y": 2}),
        key_of("export", "code", {"a": "1", "b": "2"}, {"x": 1, "y": 3}),
    ]
    assert len({base, *others}) == 5


def test_a_result_is_built_once(store: Store) -> None:
    assert store.find("trace", KEY) is None
    folder, there = store.build("trace", KEY, writes())
    assert (there, (folder / "part" / "a.bin").read_text()) == (False, "one")
    assert store.build("trace", KEY, never) == (folder, True)
    assert store.find("trace", KEY) == folder
    assert store.verify("trace", KEY)
    assert set(store.hashes("trace", KEY)) == {"b.bin", "part/a.bin"}


def test_fresh_builds_again(store: Store) -> None:
    store.build("trace", KEY, writes("one"))
    folder, there = store.build("trace", KEY, writes("two"), fresh=True)
    assert (there, (folder / "b.bin").read_text()) == (False, "twotwo")
    assert leftovers(store) == []


@pytest.mark.parametrize("damage", ["listing", "shorter", "removed", "no json"])
def test_a_damaged_entry_is_built_anew(store: Store, damage: str) -> None:
    folder, _ = store.build("trace", KEY, writes())
    if damage == "listing":
        (folder / ENTRY).unlink()
    elif damage == "shorter":
        (folder / "b.bin").write_text("on")
    elif damage == "removed":
        (folder / "part" / "a.bin").unlink()
    else:
        (folder / ENTRY).write_text("[]")
    assert store.find("trace", KEY) is None
    assert store.build("trace", KEY, writes()) == (folder, False)
    assert store.verify("trace", KEY)


def test_changed_bytes_of_the_same_size_are_found_by_verify(store: Store) -> None:
    folder, _ = store.build("trace", KEY, writes())
    (folder / "b.bin").write_text("oneonf")
    assert store.find("trace", KEY) == folder
    assert not store.verify("trace", KEY)


def test_a_failing_stage_leaves_nothing(store: Store) -> None:
    def fail(folder: Path) -> None:
        writes()(folder)
        raise ValueError("half done")

    with pytest.raises(ValueError, match="half done"):
        store.build("trace", KEY, fail)
    assert store.find("trace", KEY) is None
    assert leftovers(store) == []


CHILD = """
import sys, time
from pathlib import Path
from lilliput.store import Store
def write(folder):
    (folder / "half.bin").write_text("half")
    print("writing", flush=True)
    time.sleep(float(sys.argv[3]))
    (folder / "b.bin").write_text("child")
print(Store(Path(sys.argv[1])).build("trace", sys.argv[2], write)[1], flush=True)
"""


def child(store: Store, sleep_s: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(store.root), KEY, str(sleep_s)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    return process


def test_a_killed_run_leaves_only_a_writing_folder_which_the_next_removes(store: Store) -> None:
    process = child(store, 60)
    store.clean()
    assert len(leftovers(store)) == 1, "its owner lives: the folder stays"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert len(leftovers(store)) == 1
    store.clean()
    assert leftovers(store) == []
    assert store.build("trace", KEY, writes())[1] is False


def test_two_runs_at_once_build_once(store: Store) -> None:
    process = child(store, 1.0)
    start = time.monotonic()
    folder, there = store.build("trace", KEY, never)
    assert there
    assert time.monotonic() - start > 0.3
    assert (folder / "b.bin").read_text() == "child"
    assert process.communicate()[0] == "False\n"


@pytest.mark.parametrize(
    ("number", "kind", "code", "said"),
    [
        (errno.ENOSPC, MissingError, 4, "the disk is full"),
        (errno.EDQUOT, MissingError, 4, "the disk is full"),
        (errno.EROFS, OutputError, 2, "cannot be written"),
        (errno.EACCES, OutputError, 2, "cannot be written"),
    ],
)
def test_a_full_or_read_only_disk_is_one_line_and_leaves_nothing(
    store: Store, number: int, kind: type[Exception], code: int, said: str
) -> None:
    def fail(folder: Path) -> None:
        (folder / "half.bin").write_text("half")
        raise OSError(number, os.strerror(number), str(folder / "half.bin"))

    with pytest.raises(kind, match=said) as caught:
        store.build("trace", KEY, fail)
    assert "\n" not in str(caught.value)
    assert getattr(caught.value, "exit_code") == code  # noqa: B009
    assert leftovers(store) == []


def test_publishing_replaces_the_folder_and_copies_without_the_listing(store: Store, tmp_path: Path) -> None:
    folder, _ = store.build("export", KEY, writes())
    destination = tmp_path / "out" / "onnx"
    destination.mkdir(parents=True)
    (destination / "old.bin").write_text("old")
    publish(folder, destination)
    assert sorted(p.name for p in destination.rglob("*.bin")) == ["a.bin", "b.bin"]
    assert not (destination / ENTRY).exists()
    (destination / "b.bin").write_text("changed by the user")
    assert store.verify("export", KEY), "the store's copy is its own"
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["onnx"]


def test_a_publication_that_fails_leaves_what_was_there(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = store.build("export", KEY, writes())
    destination = tmp_path / "out" / "onnx"
    destination.mkdir(parents=True)
    (destination / "old.bin").write_text("old")

    def full(source: Path, copy: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(copy))

    monkeypatch.setattr(stores.shutil, "copyfile", full)
    with pytest.raises(MissingError, match="the disk is full"):
        publish(folder, destination)
    assert [p.name for p in (tmp_path / "out").rglob("*")] == ["onnx", "old.bin"]


def test_what_no_run_uses_expires(store: Store) -> None:
    old, _ = store.build("trace", KEY, writes())
    kept, _ = store.build("trace", "u" * 64, writes())
    for folder in (old, kept):
        os.utime(folder / ENTRY, (0, 0))
    store.use("trace", "u" * 64)
    store.expire()
    assert not old.exists()
    assert store.verify("trace", "u" * 64)
