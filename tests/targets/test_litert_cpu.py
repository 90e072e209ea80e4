"""LiteRT's session: one cache in place, prompts of any length in chunks of a fixed one, bad input."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import tiny_quantized_model

from exporters.litert_int8 import Exporter, Options
from lilliput.artifact import Artifact
from lilliput.decoder import Decoder
from lilliput.errors import ArtifactError, InputError
from lilliput.grid import Float
from lilliput.trace import trace
from targets.runtimes.litert_cpu import LitertSession, Runtime, chunk_length

CONTEXT, CHUNK = 40, 16
TOKENS = np.random.default_rng(5).integers(0, 320, CONTEXT).tolist()


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def artifact(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("litert")
    model = tiny_quantized_model(folder, request.param)
    with torch.device("meta"):
        traced = trace(Decoder(model.config), CONTEXT, CHUNK)
    (folder / "out").mkdir()
    return Exporter().export(model, traced, Options(bundle=False, prefill_lengths=(4,)), folder / "out", exact=True)


@pytest.fixture
def session(artifact: Artifact) -> Iterator[LitertSession]:
    opened = Runtime().open(artifact, threads=2, exact=True)
    yield opened
    opened.close()


def near(a: Float, b: Float) -> bool:
    return float(np.abs(a - b).max()) <= 1e-5 * float(b.std())


def stepwise(session: LitertSession, tokens: list[int]) -> list[Float]:
    session.reset()
    return [session.decode(token) for token in tokens]


@pytest.mark.parametrize("length", [1, 2, 3, 15, 16, 17, 18, 20, 33, 34, 39, 40])
def test_prompts_of_every_length_equal_single_steps(session: LitertSession, length: int) -> None:
    wanted = stepwise(session, TOKENS[:length])[-1]
    stepwise(session, TOKENS[::-1])  # fill the whole cache with other values
    session.reset()
    assert near(session.prefill(TOKENS[:length]), wanted)


def test_chunks_are_the_cheapest_per_token_that_fit() -> None:
    lengths = (16, 128)
    assert [chunk_length(lengths, left, 1024) for left in (1, 3, 4, 16, 72, 100, 128, 500)] == [
        1, 1, 16, 16, 16, 128, 128, 128
    ]  # fmt: skip
    assert [chunk_length(lengths, 100, room) for room in (128, 127, 16, 15)] == [128, 16, 16, 1]


def test_padding_is_never_seen_by_what_follows(session: LitertSession) -> None:
    wanted = stepwise(session, TOKENS)
    session.reset()
    seen = [session.prefill(TOKENS[:5]), *(session.decode(t) for t in TOKENS[5:])]
    assert all(near(a, b) for a, b in zip(seen, wanted[4:], strict=True))


def test_a_second_prompt_goes_behind_the_first_up_to_the_end(session: LitertSession) -> None:
    wanted = stepwise(session, TOKENS)
    session.reset()
    session.prefill(TOKENS[:20])
    assert near(session.prefill(TOKENS[20:34]), wanted[33])
    assert near(session.prefill(TOKENS[34:]), wanted[-1])


def test_logits_belong_to_the_caller(session: LitertSession) -> None:
    first = session.prefill(TOKENS[:4])
    kept = first.copy()
    session.decode(5)
    assert np.array_equal(first, kept)


def test_more_than_the_cache_holds_is_refused(session: LitertSession) -> None:
    session.prefill(TOKENS)
    with pytest.raises(InputError, match="1 tokens at position 40 do not fit a cache of 40"):
        session.decode(1)
    session.reset()
    with pytest.raises(InputError, match="empty prompt"):
        session.prefill([])


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.tflite").write_bytes(b"no model")
    with pytest.raises(ArtifactError, match=r"model\.tflite: LiteRT does not open it"):
        Runtime().open(Artifact(tmp_path, "litert_int8", "model.tflite", 8, 4), threads=1)
    with pytest.raises(ArtifactError, match="no such file"):
        Runtime().open(Artifact(tmp_path, "litert_int8", "other.tflite", 8, 4), threads=1)


def test_versions_name_the_runtime() -> None:
    assert set(Runtime().versions()) == {"ai-edge-litert"}
