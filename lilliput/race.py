"""Is B slower than A, or does it lose more? Measured here and now, on the same items, by limits: what CI asks.

    speed   both decode side by side, interleaved, until it is clear or the budget of rounds is spent (targets.race)
    loss    the divergences that validation kept of every token, where both were judged on one text: chunk by chunk
            (targets.paired). More chunks need another run with a larger evaluation.count

Each is PASS, FAIL or INCONCLUSIVE of its limit, a rise of `max_rise`; the exit code is that of the worst.
"""

from __future__ import annotations

from pathlib import Path

from lilliput import manifest
from lilliput.manifest import Manifest
from lilliput.progress import Progress
from lilliput.results import Record, Verdict, worst
from lilliput.run import EXIT_CODES
from lilliput.store import Store, default_root
from targets import machine
from targets.duel import Duel
from targets.metrics import TokenMetrics
from targets.paired import Double, Judgement, Sequence, judge_loss
from targets.race import Request, Side
from targets.race import race as measured
from targets.request import ArtifactReference

SHIPPED = "shipped.npz"  # of a validation: every scored token's figures
MIN_CHUNKS = 8  # fewer cannot be told apart at alpha, whatever they say


class Loss(Record):
    """The mean divergences of both, and what their chunks say. None where `note` says why."""

    judgement: Judgement | None
    verdict: Verdict
    note: str = ""


class Race(Record):
    a: str
    b: str
    max_rise: float
    speed: Duel
    loss: Loss

    @property
    def verdict(self) -> Verdict:
        return worst([self.speed.verdict, self.loss.verdict])

    @property
    def exit_code(self) -> int:
        return EXIT_CODES[self.verdict]


def race(a: Path, b: Path, max_rise: float, progress: Progress) -> Race:
    """Two targets' folders. Raises ArtifactError where one is none or has changed."""
    left, right = manifest.opened(a), manifest.opened(b)
    threads = left.recipe.targets[0].threads or machine.usable_cores()
    request = Request(a=_side(left, a), b=_side(right, b), threads=threads, max_rise=max_rise)
    return Race(
        a=str(a), b=str(b), max_rise=max_rise, speed=measured(request, progress), loss=loss(left, right, max_rise)
    )


def _side(described: Manifest, folder: Path) -> Side:
    artifact = ArtifactReference.of(described.open(folder))
    return Side(artifact=artifact, runtime=described.recipe.targets[0].runtime.name)


def loss(a: Manifest, b: Manifest, max_rise: float) -> Loss:
    """What the kept divergences say; all chunks at one look."""
    if a.evaluation.sha256 != b.evaluation.sha256 or a.source.sha256 != b.source.sha256:
        return Loss(judgement=None, verdict="INCONCLUSIVE", note="not the same text and source: losses do not compare")
    chunks = [_chunks(described) for described in (a, b)]
    if chunks[0] is None or chunks[1] is None:
        note = "the store no longer holds every token's divergence: run again"
        return Loss(judgement=None, verdict="INCONCLUSIVE", note=note)
    found = judge_loss(chunks[0], chunks[1], max_rise, Sequence().alpha)
    if found.items < MIN_CHUNKS and (chunks[0] != chunks[1]).any():
        found = found.model_copy(update={"verdict": "INCONCLUSIVE"})
    note = "" if found.verdict != "INCONCLUSIVE" else f"{found.items} chunks do not tell: raise evaluation.count"
    return Loss(judgement=found, verdict=found.verdict, note=note)


def _chunks(described: Manifest) -> Double | None:
    """(chunks,) mean divergences, where the store still holds the validation."""
    folder = Store(default_root()).find("validate", described.stages.get(f"validate:{described.target}", ""))
    return None if folder is None else TokenMetrics.load(folder / SHIPPED).kld.mean(axis=1)
