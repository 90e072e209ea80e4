"""Talking to an artifact on the runtime that it was proven on: prompt, sample, stream.

The prompt is rendered by the tokenizer's own chat template (Jinja); a model without one gets the text as it
is. Tokens that are in the cache already are not computed again: the next turn appends to them where its
rendering begins with them, else the cache is reset.

A token is chosen from softmax(logits / temperature), cut to the smallest set of likeliest tokens whose
probabilities sum to at least top_p (Holtzman et al. 2019, arXiv:1904.09751); temperature 0 takes the likeliest
token. The same seed gives the same answer.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from lilliput import lm_bundle, manifest, registry
from lilliput.errors import ArtifactError, InputError
from lilliput.grid import Float
from lilliput.tokenizer_folder import load_tokenizer, stop_tokens

if TYPE_CHECKING:
    from targets.base import Session

Role = Literal["system", "user", "assistant"]
HALF_A_CHARACTER = "\ufffd"  # what tokens that end within a character decode to


@dataclass(frozen=True)
class Sampler:
    """How a token is chosen from logits."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def generator(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)

    def choose(self, logits: Float, generator: np.random.Generator) -> int:
        """A token id from logits (vocab,) float32."""
        if self.temperature == 0:
            return int(logits.argmax())
        scaled = logits.astype(np.float64) / self.temperature
        likely = np.exp(scaled - scaled.max())
        likely /= likely.sum()
        order = np.argsort(-likely, kind="stable")
        kept = order[: int(np.searchsorted(likely[order].cumsum(), min(self.top_p, 1 - 1e-12))) + 1]
        return int(generator.choice(kept, p=likely[kept] / likely[kept].sum()))


class Tokenizer(Protocol):
    """What of transformers' tokenizers is used here."""

    eos_token_id: int | None
    chat_template: str | None

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str: ...

    def apply_chat_template(self, messages: Any, *, add_generation_prompt: bool, tokenize: Literal[False]) -> str: ...


@dataclass(frozen=True)
class Message:
    role: Role
    content: str


class Conversation:
    """A dialogue with one open session. `stop` are the token ids that end an answer."""

    def __init__(
        self,
        session: Session,
        tokenizer: Tokenizer,
        stop: frozenset[int],
        context: int,
        sampler: Sampler,
        max_tokens: int,
        system: str | None = None,
    ) -> None:
        self._session, self._tokenizer, self._stop = session, tokenizer, stop
        self._context, self._max_tokens, self._sampler = context, max_tokens, sampler
        self._generator = sampler.generator()
        self._messages = [Message("system", system)] if system else []
        self._cached: list[int] = []  # the tokens that the session's cache holds
        self.full = False  # whether the last answer ended because the cache was full
        if system and not tokenizer.chat_template:
            raise InputError("this model has no chat template, so a system message has no place: leave --system out")

    def ask(self, text: str) -> Iterator[str]:
        """The answer, piece by piece. Raises InputError where the prompt does not fit the artifact's context."""
        question = [*self._messages, Message("user", text)]
        prompt = self._render(question)
        if len(prompt) >= self._context:
            raise InputError(
                f"the prompt has {len(prompt)} tokens, this artifact's cache holds {self._context}: shorten it, or "
                f"export with a larger context (lilliput run … --set context={2 * len(prompt)})"
            )
        answer = ""
        for piece in self._generate(self._prefill(prompt)):
            answer += piece
            yield piece
        if self._tokenizer.chat_template:
            self._messages = [*question, Message("assistant", answer)]

    def _render(self, messages: Sequence[Message]) -> list[int]:
        """Token ids of the dialogue up to where the answer begins. The template writes its own special tokens."""
        if not self._tokenizer.chat_template:
            return self._tokenizer.encode(messages[-1].content)
        plain = [{"role": m.role, "content": m.content} for m in messages]
        text = self._tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=False)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[operator]

    def _prefill(self, prompt: list[int]) -> Float:
        """Logits after the prompt; computes only what the cache does not hold."""
        held = len(self._cached)
        if not held or held >= len(prompt) or prompt[:held] != self._cached:
            self._session.reset()
            held = 0
        self._cached = list(prompt)
        return self._session.prefill(prompt[held:])

    def _generate(self, logits: Float) -> Iterator[str]:
        """Text as it becomes certain: a piece that ends within a character waits for the next token."""
        tokens: list[int] = []
        shown, self.full = 0, False
        while len(tokens) < self._max_tokens:
            token = self._sampler.choose(logits, self._generator)
            if token in self._stop:
                break
            tokens.append(token)
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
            if not text.endswith(HALF_A_CHARACTER) and len(text) > shown:
                yield text[shown:]
                shown = len(text)
            if len(self._cached) >= self._context:
                self.full = True
                break
            logits = self._session.decode(token)
            self._cached.append(token)
        rest = self._tokenizer.decode(tokens, skip_special_tokens=True)[shown:]
        if rest:
            yield rest


@contextmanager
def open_chat(folder: Path, sampler: Sampler, max_tokens: int, system: str | None = None) -> Iterator[Conversation]:
    """Open the artifact in `folder` on its own runtime. Raises ArtifactError where it is none, or has changed."""
    described = manifest.opened(folder)
    artifact = described.open(folder)
    runtime = registry.load("runtimes", described.result.runtime)()
    with tokenizer_folder(folder, artifact.path) as home:
        tokenizer = load_tokenizer(home)
        stop = stop_tokens(home, tokenizer.eos_token_id)
    session = runtime.open(artifact, described.result.latency.threads if described.result.latency else _cores())
    try:
        yield Conversation(session, tokenizer, stop, artifact.context, sampler, max_tokens, system)
    finally:
        session.close()


def _cores() -> int:
    import psutil

    return psutil.cpu_count(logical=False) or os.cpu_count() or 1


@contextmanager
def tokenizer_folder(folder: Path, model_file: Path) -> Iterator[Path]:
    """A folder with the artifact's tokenizer: its own, or one rebuilt from a GGUF file's metadata or a bundle."""
    for place in (folder, folder / "tokenizer"):
        if (place / "tokenizer.json").is_file():
            yield place
            return
    bundle = next(iter(sorted(folder.glob("*.litertlm"))), None)
    with tempfile.TemporaryDirectory(prefix="lilliput-") as scratch:
        if model_file.suffix == ".gguf":
            from lilliput.sources import gguf_file

            gguf_file.save_tokenizer(model_file, Path(scratch))
        elif bundle is not None:
            lm_bundle.save_tokenizer(bundle, Path(scratch))
        else:
            raise ArtifactError(
                f"{folder}: no tokenizer.json beside {model_file.name}, so text has no tokens: run again"
            )
        yield Path(scratch)
