"""The `.litertlm` bundle: what it says of a conversation, and that LiteRT-LM runs it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jinja2
import pytest
from litert_cases import export, solved
from litert_lm_builder.runtime.proto import llm_metadata_pb2
from tiny_models import BOS, EOS, save_tokenizer
from tokenizers import Tokenizer

from exporters.litert_int8 import BUNDLE_FILE, bundle
from lilliput import lm_bundle
from lilliput.errors import ExportError

CHILD = Path(__file__).parent / "litert_lm_child.py"
TIMEOUT_S = 300


def litert_lm(path: Path, question: str, max_tokens: int, *texts: str) -> dict[str, Any]:
    command = [sys.executable, str(CHILD), str(path), question, str(max_tokens), *texts]
    child = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert child.returncode == 0, child.stderr[-3000:]
    found: dict[str, Any] = json.loads(child.stdout.splitlines()[-1])
    return found


def test_litert_lm_opens_a_tiny_bundle_and_runs_it(tmp_path: Path) -> None:
    given = solved(tmp_path, "grouped", "common")
    artifact = export(given, tmp_path / "out", bundle=True)
    texts = ("The quick brown fox", "Die Katze schläft.", "  two\n\nlines ")
    seen = litert_lm(artifact.folder / BUNDLE_FILE, "The lazy dog", 4, *texts)
    tokenizer = Tokenizer.from_file(str(given.tokenizer / "tokenizer.json"))
    assert seen["ids"] == [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert seen["rendered"].startswith(f"{BOS}user\nThe lazy dog{EOS}\n")
    assert seen["tokens"] > len(tokenizer.encode(seen["rendered"], add_special_tokens=False).ids)


@pytest.mark.parametrize(("model", "kind"), [("gemma3", "gemma3"), ("qwen3", "qwen3"), ("qwen2", "qwen2p5")])
def test_a_family_has_its_own_type_in_litert_lm(tmp_path: Path, model: str, kind: str) -> None:
    given = solved(tmp_path, model, "common")
    artifact = export(given, tmp_path / "out", bundle=True)
    data = (artifact.folder / BUNDLE_FILE).read_bytes()
    section = next(s for s in lm_bundle.sections(data) if s.kind == lm_bundle.METADATA)
    message = llm_metadata_pb2.LlmMetadata()
    message.ParseFromString(data[section.begin : section.end])
    assert message.llm_model_type.WhichOneof("model_type") == kind
    seen = litert_lm(artifact.folder / BUNDLE_FILE, "The lazy dog", 4)
    assert seen["rendered"].startswith(f"{BOS}user\nThe lazy dog{EOS}\n")
    assert seen["tokens"] > 4


def test_the_conversation_is_read_from_the_tokenizer(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    talk = bundle.conversation(tmp_path)
    assert talk.start_token is None  # neither the tokenizer nor the template puts one by name
    assert talk.stop_tokens == (EOS,)
    assert talk.template is not None
    assert BOS in talk.template


def test_a_template_with_bos_token_needs_the_start_token(tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(template)
    assert bundle.conversation(tmp_path).start_token == BOS


def test_parts_of_a_message_become_its_text() -> None:
    template = jinja2.Template(
        bundle.TEXT_OF_PARTS + "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
    )
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert template.render(messages=[{"role": "user:", "content": parts}, {"role": "x", "content": "y"}]) == "user:abxy"


def test_without_a_tokenizer_json_there_is_no_bundle(tmp_path: Path) -> None:
    given = solved(tmp_path, "grouped", "common")
    bare = tmp_path / "bare"
    shutil.copytree(given.tokenizer, bare)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(ExportError, match=r"no tokenizer\.json"):
        bundle.write(given.__class__(given.name, given.config, {}, {}, bare, {}), tmp_path / "m", 8, tmp_path / "b")
