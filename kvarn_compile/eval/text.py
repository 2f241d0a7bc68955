"""Windows of real text as token ids."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvarn.errors import ShapeError


def read_ids(tokenizer: Any, source: str | Path) -> Tensor:
    """All token ids [n] of a text file, without special tokens."""
    text = Path(source).read_text(encoding="utf-8")
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def start_ids(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text: a beginning-of-sequence token, or nothing."""
    plain = tokenizer("a", add_special_tokens=False).input_ids
    full = tokenizer("a").input_ids
    return full[: full.index(plain[0])]


def windows(ids: Tensor, count: int, context: int, start: list[int], seed: int = 0) -> Tensor:
    """`count` windows [count, context] spread evenly over the text, each led by the tokens `start`; `seed` shifts them.

    Raises:
        ShapeError: if the text is shorter than one window.
    """
    body = context - len(start)
    room = ids.numel() - body
    if room < 0:
        raise ShapeError(f"the text has {ids.numel()} tokens; a window needs {body}")
    shift = torch.randint(0, max(room // count, 1), (1,), generator=torch.Generator().manual_seed(seed)).item()
    begins = [int(shift) + i * (room // count) for i in range(count)]
    head = torch.tensor(start, dtype=ids.dtype)
    return torch.stack([torch.cat([head, ids[b : b + body]]) for b in begins])
