"""The command line: parses, calls, prints; nothing else.

    0  all gates pass            3  inconclusive
    1  a gate fails              4  something is missing on this machine
    2  bad input or usage        70 a defect of Lilliput; 130 interrupted

An error is one line on stderr. Nothing heavy is imported before a command asks for it, so that
`lilliput --help` answers at once. Standard output carries results only; progress goes to stderr.
"""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from typer.exceptions import TyperException

from lilliput.errors import LilliputError

BUG, INTERRUPTED, PIPE_CLOSED = 70, 130, 141
DISK = {errno.ENOSPC: "is full", errno.EDQUOT: "is over its quota", errno.EROFS: "is read-only"}

app = typer.Typer(
    name="lilliput",
    help="Quantize a small model once, emit what each runtime wants, and prove each artifact on its runtime.",
    epilog="Exit codes: 0 all gates pass, 1 a gate fails, 2 bad input, 3 inconclusive, 4 something is missing here.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

SET_HELP = "Set a value of the recipe, e.g. context=512 or targets.onnx.threads=1; may be repeated."
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output, and nothing else.")]


def _version(asked: bool) -> None:
    if asked:
        from lilliput import __version__

        typer.echo(f"lilliput {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Quantize a small model once, emit what each runtime wants, and prove each artifact on its runtime."""


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a ready recipe's name (lilliput list recipes).")],
    target: Annotated[list[str], typer.Option("--target", "-t", help="Only this target; may be repeated.")] = [],  # noqa: B006
    model: Annotated[str | None, typer.Option(help="Another model: a folder, a .gguf file, a hub id.")] = None,
    out: Annotated[Path | None, typer.Option(help="Artifacts and report.  [default: out/<recipe's name>]")] = None,
    settings: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help=SET_HELP)] = [],  # noqa: B006
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and do nothing.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Do all stages again, whatever is cached.")] = False,
    as_json: Json = False,
) -> None:
    """Do a recipe: quantize, export, prove each artifact on its runtime, report."""
    from lilliput import decide, escalation, pipeline, terminal
    from lilliput.recipe import Auto, load
    from lilliput.terminal_progress import StageDisplay

    loaded = load(recipe, settings)
    out = out or Path("out") / loaded.name
    if isinstance(loaded.quantize, Auto):
        if dry_run:
            ladder = escalation.plans(loaded, out, target, model, fresh)
            typer.echo(terminal.ladder_json(ladder)) if as_json else terminal.show_ladder(ladder)
            return
        done = escalation.climb(
            loaded, out, target, model, fresh, lambda plan: StageDisplay(plan.stages), terminal.tell_rung
        )
        terminal.show_run(done, out, as_json)
        raise typer.Exit(done.exit_code)
    plan = pipeline.plan(loaded, out, target, model, fresh)
    if dry_run:
        typer.echo(terminal.plan_json(plan)) if as_json else terminal.show_plan(plan)
        return
    done = decide.run(plan, lambda plan: StageDisplay(plan.stages))
    terminal.show_run(done, out, as_json)
    raise typer.Exit(done.exit_code)


@app.command()
def validate(
    artifact_dir: Annotated[Path, typer.Argument(help="A target's folder: DIR/<target> of `run --out DIR`.")],
    as_json: Json = False,
) -> None:
    """Prove an artifact again on this machine, by the gates of its manifest."""
    from lilliput import pipeline, terminal
    from lilliput.run import EXIT_CODES
    from lilliput.terminal_progress import Countdown

    with Countdown("validate") as progress:
        result = pipeline.validate(artifact_dir, progress)
    if as_json:
        typer.echo(result.model_dump_json(indent=2))
    else:
        terminal.show_target(result)
    raise typer.Exit(EXIT_CODES[result.verdict])


@app.command()
def verify(
    artifact_dirs: Annotated[list[Path], typer.Argument(help="Targets' folders: DIR/<target> of `run --out DIR`.")],
    rebuild: Annotated[bool, typer.Option("--rebuild", help="Quantize and export again, and compare bytes.")] = False,
    model: Annotated[str | None, typer.Option(help="Where the source lies now, for a rebuild.")] = None,
    as_json: Json = False,
) -> None:
    """Hash every file against the manifest, and what the model file says of its making. 0: all as it says, 1: not."""
    from lilliput import terminal
    from lilliput import verify as verifying
    from lilliput.terminal_progress import StageDisplay

    found = verifying.verify_all(artifact_dirs, rebuild=rebuild, model=model, watch=StageDisplay)
    if as_json:
        typer.echo(json.dumps([one.model_dump(mode="json") for one in found], indent=2))
    else:
        for one in found:
            terminal.show_verification(one)
    raise typer.Exit(max(one.exit_code for one in found))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="A .gguf, .onnx, .tflite, .litertlm or .safetensors file, or a folder.")],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Find what is wrong with it (lilliput list rules).")] = False,
    source: Annotated[str | None, typer.Option(help="With --check: the float model that it was made from.")] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="With --check: LiteRT's GPU delegate is to take it.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Show what a file or folder holds: bits per class of tensors, metadata, and whether its manifest is kept.

    With --check: what is wrong with it, where, why, and what to do; the exit code is 1 where it is an error.
    """
    from lilliput import terminal
    from lilliput.inspection import inspect as look

    if check or source or gpu:
        raise typer.Exit(_check(path, source, gpu, as_json))
    found = look(path)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        terminal.show_inspection(found, tensors)
    raise typer.Exit(0 if found.intact else 2)


def _check(path: Path, source: str | None, gpu: bool, as_json: bool) -> int:
    from contextlib import nullcontext

    from lilliput import checks, terminal

    with checks.open_source(source) if source else nullcontext() as opened:
        checked = checks.check(path, opened, gpu=gpu)
    if as_json:
        typer.echo(checked.model_dump_json(indent=2))
    else:
        terminal.show_checked(checked)
    return 1 if checked.errors else 0


@app.command()
def ladder(
    path: Annotated[Path, typer.Argument(help="A .onnx, .tflite, .litertlm or .gguf file, or its folder.")],
    source: Annotated[str, typer.Option(help="The float model that it was made from.")],
    tokens: Annotated[int, typer.Option(min=2, help="Positions of a text to run.")] = 64,
    limit: Annotated[float, typer.Option(min=0, help="Nats a token beyond which a rung is off.")] = 1e-3,
    processor: Annotated[
        str | None, typer.Option(help="ONNX: kernels on this one, emulated: Haswell, arm://cortex-a76.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say which rung of any model file lost what, and the first layer and operator that diverges where one is off.

    Exit code: 0 no rung is off, 1 one is, 3 one could not be computed.
    """
    from lilliput import checks, terminal
    from lilliput.file_ladder.climb import climb, text
    from lilliput.terminal_progress import Countdown

    with checks.open_source(source) as opened, Countdown("ladder") as progress:
        found = climb(path, opened, text(opened, tokens), limit, processor, progress)
    typer.echo(found.model_dump_json(indent=2)) if as_json else terminal.show_file_ladder(found)
    raise typer.Exit(found.exit_code)


@app.command()
def network(
    context: typer.Context,
    source: Annotated[str, typer.Argument(help="An encoder's folder, package:NAME/FILE, a .pt2, Keras or SavedModel.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The folder to write.")],
    exporter: Annotated[str, typer.Option(help="`lilliput list network_exporters`.")] = "onnx_qdq",
    runtime: Annotated[str, typer.Option(help="`lilliput list network_runtimes`.")] = "ort_static_cpu",
    activations: Annotated[str, typer.Option(help="uint16, uint8, int16 or int8.")] = "uint16",
    integer: Annotated[str, typer.Option(help="all, products or matrices: the rest stays in float32.")] = "all",
    grids: Annotated[list[str] | None, typer.Option("--grid", help="GGUF's: the first that a row can have.")] = None,
    positions: Annotated[int, typer.Option(help="Tokens of an encoder's input.")] = 128,
    samples: Annotated[Path | None, typer.Option(help="A text, or an .npz with an array per input.")] = None,
    min_sqnr_db: Annotated[float, typer.Option("--min-sqnr", help="The gate on the loss, in dB.")] = 30.0,
    chip: Annotated[str | None, typer.Option(help="A Snapdragon whose NPU is to take the nodes.")] = None,
    npu_floor: Annotated[float, typer.Option(min=0, max=1, help="The gate on their share.")] = 1.0,
    allow_pickle: Annotated[bool, typer.Option("--allow-pickle", help="Read a .pt2, or Lambda layers.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Quantize an encoder or CNN for static integer runtimes, or an encoder as GGUF, and prove the file."""
    from pydantic import ValidationError

    from lilliput import static_network
    from lilliput.errors import InputError

    asked: dict[str, object] = {
        "source": source, "out": out, "exporter": exporter, "runtime": runtime, "activations": activations,
        "integer": integer, "grids": grids, "positions": positions, "samples": samples, "min_sqnr_db": min_sqnr_db,
        "chip": chip, "npu_floor": npu_floor, "allow_pickle": allow_pickle,
    }  # fmt: skip
    given = {name: value for name, value in asked.items() if _is_given(context, name)}
    try:
        request = static_network.Request.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(f"--{first['loc'][0]}: {first['msg'].lower()}, seen {first['input']!r}") from error
    report = static_network.quantize(request)
    typer.echo(report.model_dump_json(indent=2) if as_json else "\n".join(static_network.lines(report)))
    raise typer.Exit(0 if report.verdict == "PASS" else 1)


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether the user wrote it: what is a default alone may not fit a source, and is not asked for."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@app.command()
def npu(
    path: Annotated[Path, typer.Argument(help="A QDQ .onnx file, or a folder with model.onnx.")],
    chip: Annotated[str, typer.Option("--chip", help="A Snapdragon, sm8350 to sm8850, or sc8380xp.")] = "sm8650",
    floor: Annotated[float, typer.Option(min=0, max=1, help="The gate: the least share of nodes on the NPU.")] = 1.0,
    binary: Annotated[Path | None, typer.Option(help="A folder to write the NPU's context binary into.")] = None,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Show which nodes Qualcomm's NPU takes: by QNN's compiler (extra qnn), else by a static operator check."""
    from targets.npu import cover, soc

    found = cover.coverage(path, soc(chip))
    typer.echo(found.model_dump_json(indent=2) if as_json else cover.described(found, floor))
    if binary is not None:
        for file in cover.compiled(path, soc(chip), binary):
            typer.echo(f"{file}: {file.stat().st_size} bytes", err=as_json)
    raise typer.Exit(0 if found.share >= floor else 1)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="The reference: a run's folder, or its report.json.")],
    b: Annotated[Path, typer.Argument(help="The candidate.")],
    measure: Annotated[
        bool, typer.Option("--measure", help="Two targets' folders: time both here, interleaved.")
    ] = False,
    max_rise: Annotated[float, typer.Option(min=0, help="By what share --measure lets time and loss rise.")] = 0.02,
    as_json: Json = False,
) -> None:
    """Compare two runs: size, speed, memory and loss, and whether a difference means anything.

    With --measure the exit code is a verdict: 0 B keeps to --max-rise, 1 it does not, 3 the noise is too large.
    """
    from lilliput import terminal

    if measure:
        from lilliput.race import race
        from lilliput.terminal_progress import Countdown

        with Countdown("compare") as progress:
            raced = race(a, b, max_rise, progress)
        typer.echo(raced.model_dump_json(indent=2)) if as_json else terminal.show_race(raced)
        raise typer.Exit(raced.exit_code)
    from lilliput.compare import compare as difference

    found = difference(a, b)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        terminal.show_comparison(found)


@app.command()
def ab(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a ready recipe's name.")],
    set_a: Annotated[list[str], typer.Option("--set-a", metavar="KEY=VALUE", help="Set a value of A.")] = [],  # noqa: B006
    set_b: Annotated[list[str], typer.Option("--set-b", metavar="KEY=VALUE", help="Set a value of B.")] = [],  # noqa: B006
    settings: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help="Set a value of both.")] = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Solve a recipe with two settings, e.g. of calibration.samples, and say which loses less on the same text."""
    from lilliput import ab as abs_
    from lilliput import terminal
    from lilliput.recipe import load
    from lilliput.terminal_progress import StageDisplay

    both = abs_.sides(load(recipe, [*settings, *set_a]), load(recipe, [*settings, *set_b]), set_a, set_b)
    with StageDisplay(abs_.planned(both)) as watcher:
        found = abs_.ab(both, watcher)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        terminal.show_ab(found)


@app.command()
def sweep(
    recipe: Annotated[str, typer.Argument(help="A recipe file, or a ready recipe's name.")],
    model: Annotated[str | None, typer.Option(help="Another model: a folder, a .gguf file, a hub id.")] = None,
    bits: Annotated[str, typer.Option(help="Widths, falling.")] = "8,6,5,4,3,2",
    solver: Annotated[str, typer.Option(help="What chooses the codes (lilliput list solvers).")] = "gptq",
    block: Annotated[int, typer.Option(min=2, help="Columns in a block.")] = 32,
    chunks: Annotated[int, typer.Option(min=1, help="Evaluation chunks.")] = 4,
    suspects: Annotated[int, typer.Option(min=1, help="Matrices to confirm by measurement.")] = 5,
    limit: Annotated[float, typer.Option(help="Top-1 agreement below which a width has collapsed.")] = 0.7,
    settings: Annotated[list[str], typer.Option("--set", metavar="KEY=VALUE", help=SET_HELP)] = [],  # noqa: B006
    as_json: Json = False,
) -> None:  # fmt: skip
    """Find the number of bits at which a model collapses, and the matrices that do it."""
    from lilliput import sweep as sweeps
    from lilliput import terminal
    from lilliput.recipe import load
    from lilliput.terminal_progress import Countdown, StageDisplay

    options = sweeps.Options(sweeps.widths(bits), block, solver, chunks, suspects, limit)
    graph, planned = sweeps.planned(sweeps.recipe_of(load(recipe, settings), options, model))
    with StageDisplay(planned) as watcher:
        measured = sweeps.prepare(graph, options, watcher)
    with Countdown("sweep") as progress:
        found = sweeps.sweep(measured, progress)
    if as_json:
        typer.echo(found.model_dump_json(indent=2))
    else:
        terminal.show_sweep(found)


@app.command()
def chat(
    artifact_dir: Annotated[Path, typer.Argument(help="A target's folder: DIR/<target> of `run --out DIR`.")],
    prompt: Annotated[str | None, typer.Option(help="Answer this and stop. Without it: a conversation.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer, at most.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample from the likeliest share.")] = 1.0,
    seed: Annotated[int, typer.Option(help="The same seed gives the same answer.")] = 0,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
) -> None:  # fmt: skip
    """Talk to an artifact, on the runtime that it was proven on."""
    from lilliput import terminal
    from lilliput.chat import Sampler, open_chat

    with open_chat(artifact_dir, Sampler(temperature, top_p, seed), max_tokens, system) as conversation:
        terminal.talk(conversation, prompt)


@app.command(name="list")
def list_(
    kind: Annotated[
        str,
        typer.Argument(
            help="solvers, transforms, exporters, runtimes, devices, boards, families, grids, recipes or rules."
        ),
    ],
    as_json: Json = False,
) -> None:
    """List what a recipe can name, and the rules of `inspect --check`, each with its summary."""
    from lilliput import listing

    found = listing.entries(kind)
    if as_json:
        typer.echo(listing.as_json(found))
        return
    width = max((len(entry.name) for entry in found), default=0)
    for entry in found:
        typer.echo(f"{entry.name:{width}}  {entry.summary}".rstrip())


@app.command()
def schema() -> None:
    """Print the JSON schema of recipes."""
    from lilliput.recipe import json_schema

    typer.echo(json_schema(), nl=False)


@app.command()
def doctor(
    recipe: Annotated[
        str | None, typer.Argument(help="Check what this recipe needs.  [default: any one runtime]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check this machine: Python, packages, memory, disk, cores, instruction sets, runtimes."""
    from lilliput import doctor as doctors
    from lilliput import terminal

    needed = doctors.runtimes_of(recipe) if recipe else None
    checks = doctors.examine(Path(), needed)
    typer.echo(doctors.as_json(checks)) if as_json else terminal.show_checks(checks)
    raise typer.Exit(4 if any(check.status == "missing" for check in checks) else 0)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit with its code; every error becomes one line."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    os.environ.setdefault("USE_TF", "0")  # transformers would import tensorflow, and fail on Keras 3
    # torchao speaks of torch's deprecations when transformers imports it
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
    sys.exit(answer(arguments))


def answer(arguments: Sequence[str] | None) -> int:
    try:
        code = typer.main.get_command(app).main(
            None if arguments is None else list(arguments), prog_name="lilliput", standalone_mode=False
        )
    except TyperException as error:
        return _usage_error(error)
    except LilliputError as error:
        return _say(str(error), error.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except MemoryError:
        return _say("out of memory: close other programs, or choose a smaller model", 4)
    except SystemExit:  # typer's own answer to a closed pipe
        return PIPE_CLOSED
    except Exception as error:
        return _disk_error(error) or _bug(error)
    if code == INTERRUPTED:
        typer.echo("lilliput: interrupted; finished stages are kept", err=True)
    return code if isinstance(code, int) else 0


def _say(message: str, code: int) -> int:
    typer.echo(f"lilliput: error: {' '.join(message.split())}", err=True)
    return code


def _usage_error(error: TyperException) -> int:
    """Typer's own message on one line; bare `lilliput` is asked for help and gets it."""
    message = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        typer.echo(message, err=True)
        return error.exit_code
    context = getattr(error, "ctx", None)
    command = context.command_path if context else "lilliput"
    return _say(f"{message[:1].lower()}{message[1:].rstrip('.')} (see {command} --help)", error.exit_code)


def _disk_error(error: Exception) -> int | None:
    """A full or read-only disk wherever it was met; None where it is something else."""
    if not isinstance(error, OSError) or error.errno not in DISK:
        return None
    where = f"{error.filename}: " if error.filename else ""
    return _say(f"{where}the disk {DISK[error.errno]}: free space, or pass another --out", 4)


def _bug(error: Exception) -> int:
    """A defect: one line, and the traceback in a file that can be sent."""
    with tempfile.NamedTemporaryFile(
        "w", encoding="utf-8", prefix="lilliput-", suffix=".traceback.txt", delete=False
    ) as file:
        file.write("".join(traceback.format_exception(error)))
    what = f"{type(error).__name__}: {error}"
    return _say(f"this is a defect of lilliput ({what}); the traceback is in {file.name}", BUG)
