"""Boards as data: every file fits, every figure has its source, and the roofline is arithmetic with a label."""

from __future__ import annotations

import pytest

from lilliput import listing
from lilliput.errors import InputError
from lilliput.results import Host
from targets import boards


@pytest.mark.parametrize("name", boards.names())
def test_a_board_fits_and_is_listed_as_it_is(name: str) -> None:
    board = boards.load(name)
    assert all(figure.source for figure in (*board.clusters, board.isa, board.memory))
    assert set(board.runtimes) == {"ort_cpu", "litert_cpu", "llamacpp_cpu"}
    assert listing.Entry(name, board.summary) in listing.entries("boards")


def test_the_boards_of_the_recipes_are_there() -> None:
    wanted = {"raspberry-pi-5", "raspberry-pi-4", "rock-5b", "jetson-orin-nano", "generic-x86"}
    assert wanted | {"pixel-8", "pixel-9", "galaxy-s24", "galaxy-s25"} == set(boards.names())
    with pytest.raises(InputError, match="unknown board 'raspberry-pi-6': did you mean 'raspberry-pi-5'"):
        boards.load("raspberry-pi-6")


def test_the_roofline_of_a_raspberry_pi_5() -> None:
    """100 MB a token at 17.1 GB/s; 4 cores × 2.4 GHz × 32 multiply-adds over 10⁸ weights."""
    found = boards.roofline(boards.load("raspberry-pi-5"), read_bytes=100_000_000, weights=100_000_000)
    assert found.decode_tokens_per_s == pytest.approx(171)
    assert found.prefill_tokens_per_s == pytest.approx(3072)
    assert found.missing == ()
    assert found.label.startswith("estimate, uncalibrated")


def test_what_is_not_published_is_no_figure() -> None:
    found = boards.roofline(boards.load("pixel-9"), 10**8, 10**8)
    assert found.decode_tokens_per_s is None
    assert found.missing == ("memory bandwidth: not published",)
    shown = boards.shown(boards.load("galaxy-s25"), 10**8, 10**8)
    assert shown == (
        "Samsung Galaxy S25: decode at most 848 tok/s; multiply-adds a cycle of oryon-l: not published "
        "(estimate, uncalibrated: an upper bound from peak figures, not a measurement)"
    )


def test_another_machine_is_not_taken_for_the_board() -> None:
    features = boards.load("raspberry-pi-5").isa.features
    host = Host(
        device="ssh://board", cpu="Cortex-A76", architecture="aarch64", isa=features, cores=4, logical_cores=4,
        memory_bytes=1, system="Linux", python="3.11",
    )  # fmt: skip
    board = boards.load("raspberry-pi-5")
    assert boards.differences(board, host) is None
    assert "has 2 cores, a Raspberry Pi 5 4" in (boards.differences(board, host.model_copy(update={"cores": 2})) or "")
    emulated = host.model_copy(update={"cores": 2, "emulated": "QEMU 7.2"})
    assert boards.differences(board, emulated) is None
    old = host.model_copy(update={"isa": ("asimd",)})
    assert "lacks asimdhp, asimddp of a Raspberry Pi 5" in (boards.differences(board, old) or "")
