"""The model that lm-evaluation-harness meets: one that reads its requests, and answers nothing.

Tokens are those of the harness's own Hugging Face model: the tokenizer's default special tokens, but none added where
the text begins with the prefix token; an empty context is that token.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from lilliput.suites.harness import DEFAULT_TOKENS

Pair = tuple[tuple[int, ...], tuple[int, ...]]  # tokens of a context, and of what follows


class Reader(TemplateLM):  # type: ignore[misc]
    """A request in tokens."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self._read: list[Pair] = []

    def pairs(self, instances: Sequence[Any]) -> list[Pair]:
        """The tokens of requests for likelihoods, split where the harness splits them."""
        self._read = []
        self.loglikelihood(instances, disable_tqdm=True)
        return self._read

    def opened(self, instance: Any) -> tuple[tuple[int, ...], tuple[str, ...], int]:
        """Of a request for text: its tokens, its stops and the most tokens of an answer."""
        context, settings = instance.args
        wanted = normalize_gen_kwargs(settings, DEFAULT_TOKENS)
        return tuple(self.tok_encode(context)), tuple(wanted["until"]), int(wanted["max_gen_toks"])

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        special = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer.encode(string, verbose=False, **special))

    def _loglikelihood_tokens(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        self._read = [(tuple(context), tuple(following)) for _, context, following in requests]
        return [(0.0, False)] * len(requests)

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError
