"""Drives the toy models and tiny transformers models the same way: a prompt, then greedy steps."""

from dataclasses import dataclass, field
from typing import Any

import torch
import toy_models
from torch import Tensor, nn

LOSSLESS = {"preset": "k16v16", "inner": "eager"}
STYLES = ("hf", "gptfast", "llama")


@dataclass
class Driver:
    """A model with a cache and a position; `call` is what runs it, compiled or not."""

    style: str
    config: toy_models.Config
    model: nn.Module = field(init=False)
    call: Any = field(init=False)
    cache: Any = None
    position: int = 0

    def __post_init__(self):
        kind = {"hf": toy_models.HFModel, "gptfast": toy_models.GptFast, "llama": toy_models.Llama}[self.style]
        torch.manual_seed(1)
        self.model = self.call = kind(self.config).eval()
        if self.style == "hf":
            self.cache = self.model.new_cache()

    def compile(self, **options) -> "Driver":
        self.call = torch.compile(self.model, backend="kvarn", options={**LOSSLESS, **options})
        return self

    def caches(self) -> list[Tensor]:
        """K and V of every layer."""
        if self.style == "hf":
            return [t for layer in self.cache for t in (layer.keys, layer.values)]
        if self.style == "gptfast":
            return [t for c in self.model.caches for t in (c.k_cache, c.v_cache)]
        return [t for layer in self.model.layers for t in (layer.cache_k, layer.cache_v)]

    def step(self, ids: Tensor) -> Tensor:
        """Logits [B, vocab] after the last of ids [B, n]."""
        n = ids.shape[1]
        with torch.no_grad():
            if self.style == "hf":
                out = self.call(ids, self.cache)
            elif self.style == "gptfast":
                out = self.call(ids, torch.arange(self.position, self.position + n))
            else:
                out = self.call(ids, self.position)
        self.position += n
        return out[:, -1]

    def rewind(self, position: int) -> None:
        self.position = position
        if self.style == "hf":
            for layer in self.cache:
                layer.cumulative_length.fill_(position)

    def generate(self, ids: Tensor, steps: int = 4) -> tuple[Tensor, Tensor]:
        """Greedy tokens [B, steps] and logits [steps, B, vocab]."""
        tokens, logits = [], []
        for _ in range(steps):
            logits.append(self.step(ids))
            ids = logits[-1].argmax(-1, keepdim=True)
            tokens.append(ids)
        return torch.cat(tokens, 1), torch.stack(logits)


def prompt(config: toy_models.Config, length: int, seed: int = 3) -> Tensor:
    return torch.randint(0, config.vocab, (config.batch, length), generator=torch.Generator().manual_seed(seed))


def assert_same(plain: tuple[Tensor, Tensor], packed: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(plain[0], packed[0])
    torch.testing.assert_close(plain[1], packed[1], atol=2e-5, rtol=2e-5)
