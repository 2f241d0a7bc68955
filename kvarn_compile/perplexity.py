"""Perplexity on a page of real text, in decode regime: chunks of one tile, all history read from the cache.

The page is chapter I of Jane Austen's "Emma" (1815, public domain), shipped as emma.txt.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files

import torch
from torch import Tensor
from torch.nn import functional as F

from kvarn_compile.decode import Step

CHUNK = 128
"""Tokens of one forward call: one tile, so that every earlier chunk but the last is read from packed records."""


@dataclass(frozen=True)
class Score:
    """How a model did on n places of a text.

    Attributes:
        perplexity: exp of the mean negative log likelihood in nats.
        choices: int64 [n], the most likely next token at each place.
    """

    perplexity: float
    choices: Tensor

    def agreement(self, other: "Score") -> float:
        """Part of the places, 0 to 1, at which both prefer the same next token."""
        return (self.choices == other.choices).double().mean().item()


def page_text() -> str:
    """The shipped page."""
    return (files("kvarn_compile") / "emma.txt").read_text(encoding="utf-8")


def page_ids(tokenizer, chunks: int) -> Tensor:
    """The page's first whole chunks and one token more, at most `chunks` of them: int64 [1, CHUNK * m + 1].

    Raises:
        ValueError: if the page is shorter than one chunk under this tokenizer.
    """
    ids = tokenizer(page_text(), return_tensors="pt").input_ids
    whole = min(chunks, (ids.shape[1] - 1) // CHUNK)
    if not whole:
        raise ValueError(f"the page has {ids.shape[1]} tokens; at least {CHUNK + 1} are needed")
    return ids[:, : whole * CHUNK + 1]


def score(step: Step, ids: Tensor, advance: Callable[[int], None] = lambda count: None) -> Score:
    """Score ids [1, CHUNK * m + 1]: every token but the first is predicted from all before it.

    `step` starts with an empty cache of at least CHUNK * m positions. `advance` is called with 1 after each chunk.
    """
    total, choices = 0.0, []
    for start in range(0, ids.shape[1] - 1, CHUNK):
        with torch.no_grad():
            logits = step(ids[:, start : start + CHUNK], torch.arange(start, start + CHUNK)[None])[0].float()
        total += F.cross_entropy(logits, ids[0, start + 1 : start + CHUNK + 1], reduction="sum").item()
        choices.append(logits.argmax(-1))
        advance(1)
    return Score(math.exp(total / (ids.shape[1] - 1)), torch.cat(choices))
