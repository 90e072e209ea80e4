"""What an exporter does not lower is refused by name."""

from __future__ import annotations

import pytest
from tiny_models import LLAMA

from exporters.base import refuse_features
from lilliput.errors import ExportError
from lilliput.families import gemma3, llama


def test_features_that_are_not_lowered_are_named() -> None:
    config = gemma3.config(LLAMA)
    with pytest.raises(
        ExportError, match=r"some runtime: no lowering yet of qk_norm, post_norms, .*, local_rope, which"
    ):
        refuse_features(config, frozenset({"embedding_scale"}), "some runtime")
    refuse_features(config, config.features, "some runtime")
    refuse_features(llama.config(LLAMA), frozenset(), "some runtime")
