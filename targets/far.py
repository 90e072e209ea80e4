"""A device that is reached by commands: the same worker as on this machine, in a Python that is there.

A transport turns a shell script into a local command that runs it on the device, and copies files. What is on the
device lies in one folder, which `mktemp` makes:

    src/        the sources that the worker imports (numpy, pydantic, psutil and the runtime's package are there)
    0/, 1/, …   pushed files and folders, and each request's own files
    *.pid       the process groups that work

A guardian makes that folder, tells its name and then waits at its standard input. When that closes, because we close,
because we are killed, or because the connection breaks, it kills those groups and removes the folder: nothing is left
even on a device that we cannot reach any more.

Where the device has no Python, a `runner` of the user's is pushed and started as `runner REQUEST REPLY`: it reads and
writes the JSON of targets.request, logits as .npy, progress on its standard output, as targets.worker does.

The float model's logits stay here: the worker writes the runtime's logits, which are pulled and compared here.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import selectors
import shlex
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath, PurePosixPath
from typing import Protocol

from pydantic import Field

from lilliput.artifact import Artifact
from lilliput.errors import InputError, MeasurementError
from lilliput.progress import Progress, silent
from targets import accuracy, outcome, shell_probe, shell_sensors
from targets.probe import Probe
from targets.process import Ended, Limits, follow, kill_group
from targets.request import AccuracyTask, LatencyReply, LatencyTask, LogitsTask, Reply, Request, SuiteTask

GUARDIAN = """
trap '' HUP PIPE
umask 077
d=$(mktemp -d {folder}/lilliput-XXXXXX) || exit 73
echo "$d"
cat >/dev/null 2>&1
exec >/dev/null 2>&1
end() {{ for f in "$d"/*.pid; do p=$(cat "$f") && {{ kill -s KILL -- "-$p"; kill -s KILL "$p"; }}; done; }}
end; rm -rf "$d"; end; rm -rf "$d"
"""
WORKER_MODULES = ("targets.worker", "targets.probe")
DISK_FULL = ("No space left on device", "Disk quota exceeded", "Wrote only ")  # the last one is GNU tar's
TOO_OLD = 69  # a status of ours: the Python there is older than lilliput's


class FarOptions(Limits):
    """Where it works on the device, and how long a connection may take to answer."""

    python: str = Field("python3", min_length=1)  # with numpy, pydantic, psutil and the runtime's package
    runner: Path | None = None  # a program of ours in place of that Python: `runner REQUEST REPLY`
    folder: str = Field("/tmp", min_length=1)
    answer_s: float = Field(30.0, gt=0)  # of a short command


class Transport(Protocol):
    """How commands and files come to one device."""

    name: str  # for people: ssh://pi@board

    def shell(self, script: str) -> list[str]:
        """The local command that runs a POSIX shell script there, its three streams and exit status connected."""
        ...

    def lost(self, status: int, stderr: str) -> str | None:
        """Why the device did not run a script to its end, and what to do; None where the status is the script's own."""
        ...

    def put(self, files: Sequence[tuple[Path, str]], folder: PurePosixPath, patience_s: float) -> Ended:
        """Copy each local file to a name (which may have folders) below a folder there."""
        ...

    def get(self, there: PurePosixPath, here: Path, patience_s: float) -> Ended:
        """Copy a file of the device."""
        ...

    def close(self) -> None:
        """Let go of the connection. Never raises."""
        ...


def quoted(path: PurePath) -> str:
    """As one word of a shell script."""
    return shlex.quote(str(path))


def run_for(
    command: Sequence[str],
    patience_s: float,
    stdin: Path | None = None,
    stdout: Path | None = None,
    both: bool = False,
) -> Ended:
    """A local command that ends by itself, or is ended with its group when patience does.

    `both` is for commands that write their errors to standard output.
    """
    with contextlib.ExitStack() as files, tempfile.TemporaryFile() as stderr:
        given = files.enter_context(stdin.open("rb")) if stdin else subprocess.DEVNULL
        taken = files.enter_context(stdout.open("wb")) if stdout else stderr if both else subprocess.DEVNULL
        process = subprocess.Popen(command, stdin=given, stdout=taken, stderr=stderr, start_new_session=True)
        stopped = None
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            stopped = f"did not end within {patience_s:g} s and was stopped"
        finally:
            kill_group(process)
        stderr.seek(0)
        return Ended(process.returncode, stopped, stderr.read().decode(errors="replace"))


@dataclass(frozen=True)
class _Asked:
    """A request as it went to the device, and what is to be done with its reply."""

    request: Request
    folder: PurePosixPath
    pid_file: PurePosixPath
    logits: Mapping[int, AccuracyTask]  # task number → what was asked for here
    answers: Mapping[int, SuiteTask]


class FarConnection:
    """A device over a transport. Raises MeasurementError from the start where it cannot be reached."""

    def __init__(self, transport: Transport, options: FarOptions) -> None:
        self._transport, self._options = transport, options
        self._lock, self._numbers = threading.Lock(), itertools.count()
        self._pushed: dict[tuple[Path, int, int], PurePosixPath] = {}
        self._away: str | None = None
        self._scratch = tempfile.TemporaryDirectory(prefix="lilliput-")
        self._guardian: subprocess.Popen[bytes] | None = None
        try:
            self._folder = self._guarded()
            self._push_worker()
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        return self._transport.name

    def _push_worker(self) -> None:
        runner = self._options.runner
        if runner is None:
            self._put([(path, f"src/{name}") for path, name in sources()], self._folder, "lilliput's sources")
            return
        if not runner.is_file():
            raise InputError(f"runner {runner}: no such file, wanted a program that is built for {self.name}")
        self._put([(runner, "src/runner")], self._folder, "the runner")
        self._shell(f"chmod 755 {quoted(self._folder)}/src/runner", "the runner")

    def probe(self) -> Probe:
        if self._options.runner is not None:
            return self._probe_by_shell()
        python, folder, too_old = (
            self._options.python,
            quoted(self._folder),
            "import sys; sys.exit(sys.version_info < (3, 11))",
        )
        answer = Path(self._scratch.name) / "probe.json"
        script = (
            f"cd {folder}/src && {python} -c {shlex.quote(too_old)}; s=$?; test $s = 1 && exit {TOO_OLD}; "
            f"test $s = 0 || exit $s; exec {python} -m targets.probe {shlex.quote(self.name)} {folder}"
        )
        ended = run_for(self._transport.shell(script), self._options.answer_s, stdout=answer)
        self._check(ended, "asking what it is")
        return Probe.model_validate_json(answer.read_text().splitlines()[-1])

    def _probe_by_shell(self) -> Probe:
        answer = Path(self._scratch.name) / "probe.txt"
        script = shell_probe.SCRIPT.format(folder=quoted(self._folder))
        self._check(run_for(self._transport.shell(script), self._options.answer_s, stdout=answer), "asking what it is")
        return shell_probe.parse(answer.read_text(errors="replace"), self.name)

    def _sensors(self) -> str:
        said = Path(self._scratch.name) / "sensors.txt"
        ended = run_for(self._transport.shell(shell_sensors.SCRIPT), self._options.answer_s, stdout=said)
        self._check(ended, "reading its sensors")
        return said.read_text(errors="replace")

    def push(self, path: Path) -> PurePosixPath:
        """A folder goes with the files that are in it, not those in folders below, but for the sources' own."""
        files = [(path, path.name)] if path.is_file() else [(f, f.name) for f in sorted(path.iterdir()) if f.is_file()]
        return self._push(path, files) / (path.name if path.is_file() else "")

    def pull(self, there: PurePath, here: Path) -> None:
        ended = self._transport.get(PurePosixPath(there), here, self._options.limit_s)
        self._check(ended, f"pulling {there.name}")

    def run(self, request: Request, progress: Progress = silent) -> Reply:
        asked = self._asked(request)
        timed = self._options.runner is not None and any(isinstance(task, LatencyTask) for task in request.tasks)
        try:
            before = self._sensors() if timed else ""
            reply = self._run(asked, progress)
            if timed:
                reply = _with_sensors(reply, before, self._sensors())
            return self._taken(asked, reply)
        finally:
            with contextlib.suppress(MeasurementError):
                self._shell(f"rm -rf {quoted(asked.folder)} {quoted(asked.pid_file)}", "cleaning up")

    def close(self) -> None:
        guardian = self._guardian
        if guardian is not None and guardian.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                guardian.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                guardian.wait(self._options.answer_s)
            kill_group(guardian)
        self._transport.close()
        self._scratch.cleanup()

    # --- the device's folder

    def _guarded(self) -> PurePosixPath:
        """Start the guardian; the folder that it made."""
        log = Path(self._scratch.name) / "guardian.txt"
        script = GUARDIAN.format(folder=shlex.quote(self._options.folder.rstrip("/")))
        with log.open("wb") as stderr:
            self._guardian = subprocess.Popen(
                self._transport.shell(script),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
            )
        assert self._guardian.stdout is not None
        for line in _lines_within(self._guardian.stdout.fileno(), self._options.answer_s):
            if "/lilliput-" in line:
                return PurePosixPath(line.strip())
        ended = self._guardian.poll() is not None or _ends(self._guardian, 1.0)
        kill_group(self._guardian)
        stopped = None if ended else f"did not answer within {self._options.answer_s:g} s: raise the device's answer_s"
        self._check(Ended(self._guardian.returncode, stopped, log.read_text(errors="replace")), "connecting")
        raise MeasurementError(f"{self.name}: its shell ended without a word: connect once by hand")

    def _push(self, path: Path, files: list[tuple[Path, str]]) -> PurePosixPath:
        """The folder there that holds the files; a second time nothing is copied."""
        with self._lock:
            status = path.stat()
            key = (path.resolve(), status.st_mtime_ns, status.st_size)
            if key not in self._pushed:
                folder = self._folder / str(next(self._numbers))
                self._put(files, folder, path.name)
                self._pushed[key] = folder
            return self._pushed[key]

    def _put(self, files: list[tuple[Path, str]], folder: PurePosixPath, what: str) -> None:
        self._check_lost()
        size = sum(path.stat().st_size for path, _ in files)
        self._check(self._transport.put(files, folder, self._options.limit_s), f"pushing {what} ({size / 1e6:.1f} MB)")

    # --- one request

    def _asked(self, request: Request) -> _Asked:
        with self._lock:
            number = next(self._numbers)
        folder, pid_file = self._folder / str(number), self._folder / f"{number}.pid"
        artifact = request.artifact
        lies = self._push(artifact.folder, _model_files(artifact.artifact()))
        tasks, logits, answers = [], {}, {}
        for i, task in enumerate(request.tasks):
            if isinstance(task, AccuracyTask):
                logits[i] = task
                task = LogitsTask(
                    tokens=Path(self.push(task.tokens)),
                    scored_from=task.scored_from,
                    first=task.first,
                    chunks=task.chunks,
                    logits_out=Path(folder / f"logits-{i}.npy"),
                )
            if isinstance(task, SuiteTask):
                answers[i] = task
                task = SuiteTask(
                    questions=Path(self.push(task.questions)),
                    reference=Path(self.push(task.reference)),
                    answers_out=Path(folder / f"answers-{i}.json"),
                )
            tasks.append(task)
        there = artifact.model_copy(update={"folder": Path(lies)})
        sent = request.model_copy(update={"artifact": there, "tasks": tuple(tasks)})
        return _Asked(sent, folder, pid_file, logits, answers)

    def _run(self, asked: _Asked, progress: Progress) -> Reply:
        with tempfile.TemporaryDirectory(dir=self._scratch.name) as name:
            scratch = Path(name)
            (scratch / "request.json").write_text(asked.request.model_dump_json())
            self._put([(scratch / "request.json", "request.json")], asked.folder, "a request")
            command = self._transport.shell(self._worker(asked))
            ended = follow(command, scratch / "stderr.txt", self._options, progress)
            if ended.stopped or ended.status != 0:
                self._stop(asked)
            self._check_lost(ended, asked.request)
            reply = self._reply(asked, scratch / "reply.json") if ended.status in (0, 1) else None
        free = "free its memory, or choose a smaller model"
        return outcome.judged(asked.request, ended, reply, free, self.name)

    def _worker(self, asked: _Asked) -> str:
        """The shell stays, so that its status tells a kill from a broken connection; it leads the group."""
        python, folder = self._options.python, quoted(asked.folder)
        worker = f"{python} -X faulthandler -m targets.worker" if self._options.runner is None else "./runner"
        return (
            f"echo $$ > {quoted(asked.pid_file)} && cd {quoted(self._folder)}/src && export OPENBLAS_NUM_THREADS=1 && "
            f"{worker} {folder}/request.json {folder}/reply.json; exit $?"
        )

    def _stop(self, asked: _Asked) -> None:
        script = f"p=$(cat {quoted(asked.pid_file)}) && kill -s KILL -- -$p"
        with contextlib.suppress(MeasurementError):
            self._shell(script, "stopping a worker", wanted=False)

    def _reply(self, asked: _Asked, here: Path) -> Reply | None:
        try:
            self.pull(asked.folder / "reply.json", here)
        except MeasurementError:
            self._check_lost(request=asked.request)
            return None
        return Reply.model_validate_json(here.read_bytes())

    def _taken(self, asked: _Asked, reply: Reply) -> Reply:
        """The reply with figures in place of logits, and with answers that lie here."""
        for i, suite in asked.answers.items():
            self.pull(asked.folder / f"answers-{i}.json", suite.answers_out)
            reply = reply.model_copy(update={"answers": suite.answers_out})
        for i, task in asked.logits.items():
            with tempfile.TemporaryDirectory(dir=self._scratch.name) as name:
                here = Path(name) / "logits.npy"
                self.pull(asked.folder / f"logits-{i}.npy", here)
                accuracy.of_logits(here, task).save(task.metrics_out)
            reply = reply.model_copy(update={"metrics": task.metrics_out, "logits": None})
        return reply

    # --- what a status means

    def _shell(self, script: str, what: str, wanted: bool = True) -> None:
        self._check_lost()
        ended = run_for(self._transport.shell(script), self._options.answer_s)
        if wanted or ended.stopped:
            self._check(ended, what)

    def _check_lost(self, ended: Ended | None = None, request: Request | None = None) -> None:
        """Raise where the device was lost before, or by this end. What is lost stays lost."""
        if ended is not None and not ended.stopped and self._away is None:
            self._away = self._transport.lost(ended.status, ended.stderr)
        if self._away is not None:
            what = f"{request.runtime} on {request.artifact.main_file} ({self.name})" if request else self.name
            raise MeasurementError(f"{what}: {self._away}")

    def _check(self, ended: Ended, what: str) -> None:
        self._check_lost(ended)
        last = f"; it last wrote: {ended.last_words}" if ended.last_words else ""
        if ended.stopped:
            raise MeasurementError(f"{self.name}, {what}: {ended.stopped}{last}")
        if ended.status == 0:
            return
        raise MeasurementError(f"{self.name}, {what}: {self._meaning(ended)}")

    def _meaning(self, ended: Ended) -> str:
        python, folder = self._options.python, self._options.folder
        if any(said in ended.stderr for said in DISK_FULL):
            return f"the disk of {folder} is full there: free some, or give the device another `folder`"
        if ended.status == TOO_OLD:
            return f"{python} is older than 3.11 there: give the device a newer `python`"
        if ended.status == 127:
            return f"there is no {python}: install Python 3.11 there, or give its path as `python`, or a `runner`"
        if "No module named" in ended.stderr:
            return f"{ended.last_words}: there, run {python} -m pip install numpy pydantic psutil and the runtime"
        last = f": {ended.last_words}" if ended.last_words else ""
        return f"ended with status {ended.status}{last}"


def _with_sensors(reply: Reply, before: str, after: str) -> Reply:
    """What the shell read, where the runner itself reads no sensor."""
    if reply.latency is None or reply.latency.conditions.sensors:
        return reply
    seen = shell_sensors.conditions(before, after)
    latency = reply.latency.latency
    if seen.throttled:
        latency = latency.model_copy(update={"unstable": f"the device throttled: {seen.throttled}"})
    return reply.model_copy(
        update={"latency": LatencyReply(latency=latency, memory=reply.latency.memory, conditions=seen)}
    )


def _lines_within(descriptor: int, patience_s: float) -> list[str]:
    """Lines up to the one that names the folder; those that came when patience or the stream ended."""
    text, until = b"", time.monotonic() + patience_s
    with selectors.DefaultSelector() as selector:
        selector.register(descriptor, selectors.EVENT_READ)
        while b"/lilliput-" not in text or not text.endswith(b"\n"):
            if not selector.select(max(0.0, until - time.monotonic())):
                break
            data = os.read(descriptor, 4096)
            if not data:
                break
            text += data
    return text.decode(errors="replace").splitlines()


def _ends(process: subprocess.Popen[bytes], patience_s: float) -> bool:
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(patience_s)
    return process.returncode is not None


def sources() -> list[tuple[Path, str]]:
    """Files and their names below src/: all that the worker and our runtimes' modules import of ours."""
    from lilliput import fingerprint
    from lilliput.listing import ROOT

    runtimes = [f"targets.runtimes.{path.stem}" for path in (ROOT / "targets" / "runtimes").glob("*_cpu.py")]
    modules, _ = fingerprint.reach([*WORKER_MODULES, *runtimes])
    found = {ROOT.joinpath(*m.split(".")) for m in modules} | {ROOT / "calibration", ROOT / "exporters"}
    paths = [p / "__init__.py" if p.is_dir() else p.with_suffix(".py") for p in sorted(found)]
    return [(p, p.relative_to(ROOT).as_posix()) for p in paths if p.is_file()]


def _model_files(artifact: Artifact) -> list[tuple[Path, str]]:
    """What a runtime opens; a checkpoint is its whole folder."""
    whole = artifact.exporter == "checkpoint"
    paths = sorted(p for p in artifact.folder.iterdir() if p.is_file()) if whole else artifact.files
    return [(path, path.relative_to(artifact.folder).as_posix()) for path in paths]
