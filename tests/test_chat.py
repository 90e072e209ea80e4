"""Chat: the sampler's distribution, the prompt by the model's own template, reuse of the cache, streaming."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sample_artifact import publish
from tiny_models import tiny_quantized_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

from lilliput import cli, terminal
from lilliput.chat import Conversation, Sampler, open_chat, tokenizer_folder
from lilliput.errors import ArtifactError, InputError
from lilliput.grid import Float
from lilliput.model import QuantizedModel
from lilliput.tokenizer_folder import load_tokenizer, stop_tokens

CHATML = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\n' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)
END = 257  # </s>


def byte_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """One token a byte (id = its place in the byte-level alphabet), <s> and </s>."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)} | {"<s>": 256, "</s>": END}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    made.chat_template = template
    return made


class Scripted:
    """A session that says given tokens whatever it is asked, and keeps what it was given."""

    def __init__(self, says: Sequence[int]) -> None:
        self.says = list(says)
        self.cache: list[int] = []
        self.prefilled: list[int] = []  # how many tokens each prefill computed
        self.resets = 0

    def _logits(self) -> Float:
        logits = np.zeros(258, np.float32)
        logits[self.says.pop(0) if self.says else END] = 9.0
        return logits

    def reset(self) -> None:
        self.cache, self.resets = [], self.resets + 1

    def prefill(self, tokens: Sequence[int]) -> Float:
        self.cache += tokens
        self.prefilled.append(len(tokens))
        return self._logits()

    def decode(self, token: int) -> Float:
        self.cache.append(token)
        return self._logits()

    def close(self) -> None: ...


def conversation(session: Scripted, template: str | None = CHATML, context: int = 512, **more: Any) -> Conversation:
    stop = frozenset({END})
    return Conversation(session, byte_tokenizer(template), stop, context, Sampler(), more.pop("max_tokens", 64), **more)


def ids(text: str) -> list[int]:
    found: list[int] = byte_tokenizer(None).encode(text, add_special_tokens=False)
    return found


def test_greedy_takes_the_likeliest() -> None:
    logits = np.array([0.1, 2.0, -1.0], np.float32)
    assert Sampler().choose(logits, np.random.default_rng(0)) == 1


def test_samples_follow_the_softmax_at_a_temperature() -> None:
    logits = np.array([0.0, 1.0, 2.0, -3.0], np.float32)
    sampler, generator = Sampler(temperature=0.7, seed=3), np.random.default_rng(3)
    seen = np.bincount([sampler.choose(logits, generator) for _ in range(20_000)], minlength=4) / 20_000
    wanted = np.exp(logits / 0.7) / np.exp(logits / 0.7).sum()
    # four standard deviations of a binomial share
    assert np.all(np.abs(seen - wanted) < 4 * np.sqrt(wanted * (1 - wanted) / 20_000) + 1e-4)


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    generator = np.random.default_rng(1)
    chosen = {Sampler(1.0, top_p=0.7).choose(logits, generator) for _ in range(400)}
    assert chosen == {0, 1}
    assert {Sampler(1.0, top_p=0.0).choose(logits, generator) for _ in range(50)} == {0}


def test_a_seed_repeats() -> None:
    logits, sampler = np.zeros(50, np.float32), Sampler(temperature=1.0, seed=11)
    first, second = sampler.generator(), sampler.generator()
    assert [sampler.choose(logits, first) for _ in range(20)] == [sampler.choose(logits, second) for _ in range(20)]


def test_prompt_is_the_models_own_template() -> None:
    session = Scripted(ids("Hi!"))
    answer = "".join(conversation(session, system="Be kind.").ask("Hello"))
    assert answer == "Hi!"
    wanted = "<s>system\nBe kind.</s><s>user\nHello</s><s>assistant\n"
    assert session.cache == [*ids(wanted), *ids("Hi!")]


def test_next_turn_computes_only_what_is_new() -> None:
    session = Scripted([*ids("Yes."), END, *ids("No.")])
    talk = conversation(session)
    assert "".join(talk.ask("One?")) == "Yes."
    assert "".join(talk.ask("Two?")) == "No."
    assert session.resets == 1
    new = "</s><s>user\nTwo?</s><s>assistant\n"
    assert session.prefilled[1] == len(ids(new))
    assert session.cache == ids("<s>user\nOne?</s><s>assistant\nYes." + new + "No.")


def test_without_a_template_the_text_is_the_prompt() -> None:
    session = Scripted(ids(" upon"))
    assert "".join(conversation(session, template=None).ask("Once")) == " upon"
    assert session.cache == ids("Once upon")


def test_a_character_of_many_tokens_is_shown_whole() -> None:
    pieces = list(conversation(Scripted(ids("é€🙂")), template=None).ask("x"))
    assert pieces == ["é", "€", "🙂"]


def test_a_character_that_is_cut_off_is_not_lost() -> None:
    talk = conversation(Scripted(ids("🙂")[:2]), template=None)
    assert "".join(talk.ask("x")) == "\ufffd"


def test_answer_ends_at_max_tokens_and_at_a_full_cache() -> None:
    assert "".join(conversation(Scripted(ids("a" * 50)), template=None, max_tokens=5).ask("x")) == "aaaaa"
    full = conversation(Scripted(ids("a" * 50)), template=None, context=4)
    assert "".join(full.ask("x")) == "aaaa"
    assert full.full


def test_prompt_longer_than_the_cache_is_refused() -> None:
    with pytest.raises(InputError, match=r"prompt has 9 tokens, this artifact's cache holds 8: .*--set context=18"):
        list(conversation(Scripted([]), template=None, context=8).ask("123456789"))


def test_system_message_without_a_template_is_refused() -> None:
    with pytest.raises(InputError, match="no chat template"):
        conversation(Scripted([]), template=None, system="Be kind.")


def test_stop_tokens_are_the_tokenizers_and_the_models(tmp_path: Path) -> None:
    assert stop_tokens(tmp_path, 2) == {2}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [5, 6]}')
    assert stop_tokens(tmp_path, 2) == {2, 5, 6}
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert stop_tokens(tmp_path, None) == {7}


def test_an_artifact_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match=r"no tokenizer.json beside model.onnx"),
        tokenizer_folder(tmp_path, tmp_path / "model.onnx"),
    ):
        pass


def test_greedy_answer_is_transformers_own(tmp_path: Path) -> None:
    """The oracle: transformers with the same dequantized weights, its own template, its own greedy generation."""
    model = tiny_quantized_model(tmp_path)
    folder = publish(model, tmp_path / "artifact")
    with open_chat(folder, Sampler(), max_tokens=12) as talk:
        answer = "".join(talk.ask("The quick brown"))
    tokenizer = AutoTokenizer.from_pretrained(model.tokenizer)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "The quick brown"}], add_generation_prompt=True, return_tensors="pt"
    )
    reference = with_weights(LlamaForCausalLM.from_pretrained(model.tokenizer), model)
    tokens = reference.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False)
    assert answer == tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)
    assert answer


HF_NAMES = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
HF_NAMES |= {f"attention.{x}": f"self_attn.{x}_proj" for x in "qkvo"} | {
    f"mlp.{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")
}


def with_weights(reference: LlamaForCausalLM, model: QuantizedModel) -> LlamaForCausalLM:
    """The reference with every parameter replaced by the artifact's."""
    state = {"model.embed_tokens.weight": "embedding", "lm_head.weight": "embedding", "model.norm.weight": "norm"}
    for layer in range(model.config.num_layers):
        state |= {f"model.layers.{layer}.{hf}.weight": f"layers.{layer}.{ours}" for ours, hf in HF_NAMES.items()}
    reference.load_state_dict({hf: torch.from_numpy(model.dequantized(ours)) for hf, ours in state.items()})
    return reference.eval()


def test_a_changed_artifact_is_not_talked_to(tmp_path: Path) -> None:
    folder = publish(tiny_quantized_model(tmp_path), tmp_path / "artifact")
    (folder / "codes.safetensors").write_bytes((folder / "codes.safetensors").read_bytes() + b"x")
    with pytest.raises(ArtifactError, match=r"codes\.safetensors has changed"), open_chat(folder, Sampler(), 8):
        pass


def test_command_answers_a_prompt_and_every_line_of_its_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = publish(tiny_quantized_model(tmp_path), tmp_path / "artifact")
    assert cli.answer(["chat", str(folder), "--prompt", "The quick", "--max-tokens", "4"]) == 0
    first = capsys.readouterr().out
    assert first.strip()
    monkeypatch.setattr("sys.stdin", io.StringIO("The quick\n\n"))
    assert cli.answer(["chat", str(folder), "--max-tokens", "4"]) == 0
    assert capsys.readouterr().out == first


def test_control_characters_of_a_model_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.talk(conversation(Scripted(ids("a\x1b[31m\tb\n")), template=None), "x")
    assert capsys.readouterr().out == "a[31m\tb\n\n"


def test_tokenizer_of_a_bundle_is_the_models_own(tmp_path: Path) -> None:
    from exporters.litert_int8 import bundle

    model = tiny_quantized_model(tmp_path)
    (tmp_path / "model.tflite").write_bytes(b"\0" * 64)
    bundle.write(model, tmp_path / "model.tflite", 128, tmp_path / "model.litertlm")
    ours = AutoTokenizer.from_pretrained(model.tokenizer)
    with tokenizer_folder(tmp_path, tmp_path / "model.tflite") as home:
        found = load_tokenizer(home)
        stops = stop_tokens(home, found.eos_token_id)
    message = [{"role": "user", "content": "The quick brown fox"}]
    assert found.apply_chat_template(message, add_generation_prompt=True) == ours.apply_chat_template(
        message, add_generation_prompt=True
    )
    assert ours.eos_token_id in stops


def test_a_bundle_that_is_damaged_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.litertlm").write_bytes(b"LITERTLM" + b"\0" * 100)
    with (
        pytest.raises(ArtifactError, match=r"model\.litertlm: holds no tokenizer\.json that can be read"),
        tokenizer_folder(tmp_path, tmp_path / "model.tflite"),
    ):
        pass
