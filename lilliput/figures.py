"""One way to write each kind of figure, in the terminal, in Markdown and on the page alike.

Three significant digits say all that these measurements know. Megabytes are 10⁶ bytes. A figure that was not
measured is an en dash, never a zero.
"""

from __future__ import annotations

from lilliput.results import Accuracy, GateResult, Metric

NONE = "–"
MEGABYTE = 10**6

UNITS: dict[str, str] = {
    "mean_kld": "nats",
    "exact_step_kld": "nats",
    "shipped_step_kld": "nats",
    "size_mb": "MB",
    "load_ms": "ms",
    "ttft_ms": "ms",
    "prefill_tokens_per_s": "tokens/s",
    "decode_tokens_per_s": "tokens/s",
    "decode_ms_p90": "ms",
    "peak_rss_mb": "MB",
}


def number(value: float | None) -> str:
    """Three significant digits; scientific only below 10⁻⁴."""
    if value is None:
        return NONE
    size = abs(value)
    if size == 0:
        return "0"
    if size < 1e-4:
        return f"{value:.1e}".replace("e-0", "e-")
    if size >= 99.95:
        return f"{value:,.0f}"
    digits = 1 if size >= 9.995 else 2 if size >= 0.9995 else 3 if size >= 0.09995 else 4
    return f"{value:.{digits}f}"


def signed(value: float | None) -> str:
    """What a rung adds: +0.103, −2.0e-7, 0."""
    if value is None or value == 0:
        return number(value)
    return f"{'+' if value > 0 else '−'}{number(abs(value))}"


def megabytes(value_bytes: int | None) -> str:
    return NONE if value_bytes is None else f"{number(value_bytes / MEGABYTE)} MB"


def count(value: int) -> str:
    """A number of things: 128, 35.1 k, 106 M."""
    for unit, name in ((10**9, " G"), (10**6, " M"), (10**4, " k")):
        if value >= unit:
            return number(value / (1000 if name == " k" else unit)) + name
    return str(value)


def stored(value_bytes: int) -> str:
    """A size that may be small: 64 B, 14.1 kB, 28.4 MB."""
    if value_bytes < 1000:
        return f"{value_bytes} B"
    return f"{number(value_bytes / 1000)} kB" if value_bytes < MEGABYTE else megabytes(value_bytes)


def milliseconds(value_ms: float | None) -> str:
    if value_ms is None:
        return NONE
    return f"{number(value_ms / 1000)} s" if value_ms >= 1000 else f"{number(value_ms)} ms"


def seconds(value_s: float) -> str:
    """A duration as a person says it: 0.4 s, 12 s, 3 min 20 s, 2 h 5 min."""
    if value_s < 10:
        return f"{value_s:.1f} s"
    whole = round(value_s)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def percent(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.1f} %"


def perplexity(accuracy: Accuracy | None) -> str:
    """Candidate's, and the float model's beside it."""
    if accuracy is None:
        return NONE
    return f"{number(accuracy.perplexity)} (float {number(accuracy.reference_perplexity)})"


def metric(name: Metric | str, value: float | None) -> str:
    """A gate's value with its unit."""
    if value is None:
        return NONE
    if is_share(name):
        return percent(value)
    if name not in UNITS and value == int(value):
        return f"{int(value):,}"  # a count
    return f"{number(value)} {UNITS.get(name, '')}".strip()


def is_share(name: str) -> bool:
    """Whether a metric is between 0 and 1, and written in percent."""
    return name == "top1_agreement" or name.startswith("slice_drop")


def limit(gate: GateResult) -> str:
    """A gate's limit as the recipe has it: ≤ 0.15 nats."""
    sign, unit = ("≤" if gate.kind == "max" else "≥"), UNITS.get(gate.name, "")
    value = f"{100 * gate.limit:g} %" if is_share(gate.name) else f"{gate.limit:g} {unit}".strip()
    return f"{sign} {value}"
