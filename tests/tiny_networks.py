"""Small models that are no decoder: a CNN with every kind of convolution, and a BERT of two layers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lilliput.network import Network
from lilliput.network.trace import trace

VOCAB, LENGTH, HIDDEN = 50, 12, 16


class Cnn(nn.Module):
    """1x12x12 images to 4 classes: strided, depthwise and pointwise convolutions, batch norms, pooling, a concat."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6())
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1, groups=8), nn.BatchNorm2d(8), nn.Hardswish())
        self.left, self.right = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.stem(x))
        x = torch.cat([self.left(x).relu(), self.right(x).sigmoid()], 1)
        features: Tensor = self.head(self.pool(x).mean((2, 3)))
        return features


def cnn(seed: int = 0) -> Cnn:
    """In eval mode, its batch norms with statistics of their own."""
    torch.manual_seed(seed)
    module = Cnn().train()
    with torch.no_grad():
        for _ in range(4):
            module(torch.randn(16, 1, 12, 12))
    return module.eval()


def images(count: int, seed: int = 1) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"image": torch.randn(1, 1, 12, 12, generator=generator)} for _ in range(count)]


def cnn_network(seed: int = 0) -> Network:
    return trace(cnn(seed), images(1)[0], name="tiny-cnn")


class Encoder(nn.Module):
    """A Hugging Face BERT classifier as (input_ids, attention_mask) → logits."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertForSequenceClassification

        config = BertConfig(
            vocab_size=VOCAB, hidden_size=HIDDEN, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=LENGTH, attn_implementation="eager",
        )  # fmt: skip
        self.model = BertForSequenceClassification(config)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask).logits
        return logits


def encoder(seed: int = 0) -> Encoder:
    torch.manual_seed(seed)
    return Encoder().eval()


def sentences(count: int, seed: int = 1) -> list[dict[str, Tensor]]:
    """Token ids with 0 to 6 positions of padding."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for i in range(count):
        ids = torch.randint(1, VOCAB, (1, LENGTH), generator=generator, dtype=torch.int32)
        mask = (torch.arange(LENGTH) < LENGTH - i % 7).to(torch.int32)[None]
        found.append({"input_ids": ids * mask, "attention_mask": mask})
    return found


def encoder_network(seed: int = 0) -> Network:
    return trace(encoder(seed), sentences(1)[0], name="tiny-bert", mask="attention_mask")
