"""A tokenizer's folder opens as AutoTokenizer opens it, without what AutoTokenizer imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from lilliput.parity_texts import TEXTS
from lilliput.tokenizer_folder import load_tokenizer
from tests import tiny_models


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_models.tiny_llama(tmp_path / "hf")


@pytest.mark.parametrize("named", ["as saved", "slow", "none"])
def test_it_is_what_autotokenizer_opens(folder: Path, named: str) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    if named == "slow":
        settings["tokenizer_class"] = settings["tokenizer_class"].removesuffix("Fast")
    elif named == "none":
        del settings["tokenizer_class"]
    path.write_text(json.dumps(settings))
    wanted, found = AutoTokenizer.from_pretrained(str(folder)), load_tokenizer(folder)
    assert type(found) is type(wanted)
    assert [found(text)["input_ids"] for text in TEXTS] == [wanted(text)["input_ids"] for text in TEXTS]
    assert found.all_special_ids == wanted.all_special_ids


def test_opening_one_imports_no_science(folder: Path) -> None:
    heavy = ("sklearn", "pandas", "scipy")
    code = (
        "import sys; from pathlib import Path; from lilliput.tokenizer_folder import load_tokenizer; "
        f"load_tokenizer(Path({str(folder)!r})); print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
