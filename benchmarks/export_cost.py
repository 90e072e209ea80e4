"""What an export costs: seconds and peak memory from solved codes to the file, target by target.

    python -m benchmarks.export_cost [--recipe smollm2-135m-everywhere] [--out out/export_cost]

Source, samples and statistics are the recipe's, and are made where the store does not hold them; they are not measured.
Then each target is exported in a process of its own, which starts, imports, traces, packs and writes: its seconds are
those of the whole process. The solve before it is another process, shown beside it. Judged are

    the export's seconds                                  wanted at most SECONDS of its exporter, on 2 cores
    peak resident memory / bytes of the float32 weights   wanted at most 2.5, of the solve too
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from benchmarks.cost import StageCost, in_child, measured
from benchmarks.runtimes import publish
from lilliput.recipe_schema import Recipe
from lilliput.results import Record
from targets import machine

RECIPE = "smollm2-135m-everywhere"
SECONDS = {"onnx_int4": 40.0, "gguf_llamacpp": 15.0, "litert_int8": 120.0}
MEMORY_LIMIT = 2.5


class Job(Record):
    """What a child process is given: a recipe of one target, and folders."""

    recipe: Recipe
    source: Path
    statistics: Path | None
    out: Path


class Costs(Record):
    """What a child process writes."""

    stages: tuple[StageCost, ...]

    @property
    def peak_rss_bytes(self) -> int:
        return max(stage.peak_rss_bytes for stage in self.stages)


class TargetCost(Record):
    """`export_s` and `solve_s` are those of whole processes, interpreter and imports included."""

    target: str
    exporter: str
    size_bytes: int
    export_s: float
    solve_s: float
    export: Costs
    solve: Costs

    @property
    def peak_rss_bytes(self) -> int:
        return max(self.export.peak_rss_bytes, self.solve.peak_rss_bytes)


class Report(Record):
    """What is written to export_cost.json."""

    model: str
    cores: int
    load: tuple[float, float]  # of the machine, one minute's mean, before and after
    weights_bytes: int  # float32
    targets: tuple[TargetCost, ...]

    def verdict(self, found: TargetCost) -> Literal["PASS", "MISS"]:
        holds = found.export_s <= SECONDS[found.exporter] and self.ratio(found) <= MEMORY_LIMIT
        return "PASS" if holds else "MISS"

    def ratio(self, found: TargetCost) -> float:
        return found.peak_rss_bytes / self.weights_bytes


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 0 where all limits hold, else 1."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.export_cost", description=__doc__.splitlines()[0] if __doc__ else ""
    )
    parser.add_argument("--recipe", default=RECIPE)
    parser.add_argument("--out", type=Path, default=Path("out/export_cost"))
    options = parser.parse_args(arguments)
    shutil.rmtree(options.out, ignore_errors=True)
    options.out.mkdir(parents=True)
    report = measure(options.recipe, options.out.resolve())
    verdicts = [report.verdict(found) for found in report.targets]
    return publish(report, markdown(report), options.out / "export_cost", verdicts)


def measure(recipe_name: str, out: Path) -> Report:
    from lilliput import recipe as recipes
    from lilliput.assignment import parameter_count
    from lilliput.source import open_stage

    recipe = recipes.load(recipe_name)
    in_child(_prepare, recipe, out)
    prepared = Job.model_validate_json((out / "prepared.json").read_bytes())
    load = os.getloadavg()[0]
    targets = tuple(
        _target(prepared.model_copy(update={"recipe": one, "out": out / one.targets[0].name}))
        for one in (recipe.model_copy(update={"targets": (target,)}) for target in recipe.targets)
    )
    source = open_stage(prepared.source)
    return Report(
        model=source.name, cores=machine.usable_cores(), load=(load, os.getloadavg()[0]),
        weights_bytes=4 * parameter_count(source.config), targets=targets,
    )  # fmt: skip


def _prepare(recipe: Recipe, out: Path) -> None:
    """Source and statistics of the recipe, by the pipeline, in prepared.json."""
    from lilliput import graph, pipeline, planning
    from lilliput.store import Store, default_root

    work = pipeline.Work(Store(default_root()), pipeline.Quiet(), fresh=False)
    built = graph.build(recipe, planning.source_sha256(recipe.model), planning.host_of(recipe))
    gathered = work.verified(built.statistics) if built.statistics else None
    job = Job(recipe=recipe, source=work.verified(built.source), statistics=gathered, out=out)
    (out / "prepared.json").write_text(job.model_dump_json())


def _target(job: Job) -> TargetCost:
    """Solve and export one target, each in a process."""
    from lilliput.stages.export import open_artifact

    job.out.mkdir()
    (target,) = job.recipe.targets
    solve_s = in_child(_solve, job)
    export_s = in_child(_export, job)
    return TargetCost(
        target=target.name, exporter=target.exporter.name, size_bytes=open_artifact(job.out / "export").size_bytes,
        export_s=export_s, solve_s=solve_s,
        export=Costs.model_validate_json((job.out / "export-cost.json").read_bytes()),
        solve=Costs.model_validate_json((job.out / "solve-cost.json").read_bytes()),
    )  # fmt: skip


def _solve(job: Job) -> None:
    import torch

    from lilliput.progress import silent
    from lilliput.recipe_schema import Budget
    from lilliput.stages import quantize

    torch.set_num_threads(machine.usable_cores())
    rules = job.recipe.quantize_of(job.recipe.targets[0])
    if isinstance(rules, Budget):
        raise SystemExit(f"{job.recipe.name}: a budget's rules are chosen by other stages: give a recipe with rules")
    stages: list[StageCost] = []
    with measured("solve", stages, job.out / "quantize") as folder:
        quantize.work(job.source, job.statistics, rules, job.recipe.model.name, folder, silent)
    (job.out / "solve-cost.json").write_text(Costs(stages=tuple(stages)).model_dump_json())


def _export(job: Job) -> None:
    import torch

    from lilliput.progress import silent
    from lilliput.stages import export, trace

    torch.set_num_threads(machine.usable_cores())
    recipe, stages = job.recipe, list[StageCost]()
    with measured("trace", stages, job.out / "trace") as folder:
        trace.work(job.source, recipe.context, recipe.prefill, folder, silent)
    with measured("export", stages, job.out / "export") as folder:
        export.work(job.out / "quantize", job.out / "trace", recipe.targets[0].exporter, {}, folder, silent)
    (job.out / "export-cost.json").write_text(Costs(stages=tuple(stages)).model_dump_json())


def markdown(report: Report) -> str:
    lines = [
        f"{report.model}: {report.weights_bytes / 1e6:.0f} MB in float32; {report.cores} cores, "
        f"load {report.load[0]:.1f} before and {report.load[1]:.1f} after",
        "",
        "| target | MB | export s | wanted | trace s | pack and write s | solve s | peak RSS MB, export | solve "
        "| peak / float32 weights | wanted | verdict |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    lines += [_line(report, found) for found in report.targets]
    return "\n".join(lines) + "\n"


def _line(report: Report, found: TargetCost) -> str:
    trace_s, write_s = (stage.seconds for stage in found.export.stages)
    return (
        f"| {found.target} | {found.size_bytes / 1e6:.1f} | {found.export_s:.1f} | ≤ {SECONDS[found.exporter]:.0f} "
        f"| {trace_s:.1f} | {write_s:.1f} | {found.solve_s:.1f} | {found.export.peak_rss_bytes / 1e6:.0f} "
        f"| {found.solve.peak_rss_bytes / 1e6:.0f} | {report.ratio(found):.2f} | ≤ {MEMORY_LIMIT} "
        f"| {report.verdict(found)} |"
    )


if __name__ == "__main__":
    raise SystemExit(main())
