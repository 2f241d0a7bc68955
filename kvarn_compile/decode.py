"""The decode loop that `kvarn generate`, `kvarn demo` and the examples share: greedy tokens, one forward call each."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from rich.console import Console
from torch import Tensor

Step = Callable[[Tensor, Tensor], Tensor]
"""(token ids [1, n], their positions [1, n]) -> logits [1, 1 or n, vocabulary]; it writes to a cache it knows."""


def greedy(step: Step, ids: Tensor, new_tokens: int, stop: frozenset[int] = frozenset()) -> Iterator[int]:
    """Yield up to `new_tokens` tokens of greatest logit after the prompt ids [1, n], ending after a token of `stop`."""
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    for _ in range(new_tokens):
        with torch.no_grad():
            ids = step(ids, positions)[:, -1:].argmax(-1)
        token = int(ids)
        yield token
        if token in stop:
            return
        positions = positions[:, -1:] + 1


def warm_up(step: Step, ids: Tensor) -> None:
    """Make the first prompt call and the first one-token call: in these a compiled model compiles.

    The cache is not empty afterwards: reset it.
    """
    for _ in greedy(step, ids, 2):
        pass


@dataclass
class Generated:
    """What a generation produced: token ids, and the time in seconds at which each was ready."""

    tokens: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """Of the one-token calls, the prompt's call left out; nan if there was none."""
        calls = len(self.seconds) - 1
        return calls / (self.seconds[-1] - self.seconds[0]) if calls > 0 else float("nan")


def stream(tokens: Iterable[int], tokenizer, write: Callable[[str], object] = lambda text: None) -> Generated:
    """Run a generation to its end, passing each piece of text to `write` as soon as it is whole characters."""
    out, written = Generated(), ""
    for token in tokens:
        out.tokens.append(token)
        out.seconds.append(time.perf_counter())
        text = tokenizer.decode(out.tokens, skip_special_tokens=True)
        if not text.endswith("�"):
            write(text[len(written):])
            written = text
    return out


def writer(console: Console) -> Callable[[str], None]:
    """A function that prints pieces of text one after another, as they are."""
    return lambda text: console.print(text, end="", markup=False, highlight=False, soft_wrap=True)
