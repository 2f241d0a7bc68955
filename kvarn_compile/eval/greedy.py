"""How long a quantized cache writes the same text: greedy continuations against the unquantized model's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kvarn.errors import ShapeError
from kvarn_compile.eval.harness import CHUNK
from kvarn_compile.eval.hf import run_chunk
from kvarn_compile.eval.methods.base import Facts, Method
from kvarn_compile.eval.session import Session


@torch.no_grad()
def continuation(model: Any, prompt: Tensor, tokens: int, facts: Facts) -> Tensor:
    """The unquantized model's greedy continuation [B, tokens] of prompt [B, P].

    Raises:
        ShapeError: unless P and `tokens` are multiples of CHUNK.
    """
    if prompt.shape[1] % CHUNK or tokens % CHUNK:
        raise ShapeError(f"{tokens} tokens after {prompt.shape[1]}; valid: multiples of {CHUNK}")
    session = Session(Method("unquantized", facts), prompt.shape[1] + tokens)
    token = _choices(model, prompt, session)[:, -1:]
    found = [token]
    for _ in range(tokens - 1):
        token = _step(model, token, session)
        found.append(token)
    return torch.cat(found, 1)


@torch.no_grad()
def divergence(model: Any, prompt: Tensor, expected: Tensor, methods: Sequence[Method]) -> dict[str, list[int]]:
    """Per method and row, how many tokens of the continuation `expected` [B, N] it writes before its first other one.

    Fed the expected tokens, a method's greedy choice is its own continuation up to the first difference.
    """
    ids = torch.cat([prompt, expected], 1)
    found = {}
    for method in methods:
        choice = _choices(model, ids, Session(method, ids.shape[1]))[:, prompt.shape[1] - 1 : -1]
        same = (choice == expected).long().cumprod(1)
        found[method.name] = same.sum(1).tolist()
    return found


def _choices(model: Any, ids: Tensor, session: Session) -> Tensor:
    """Most likely next tokens [B, n] after each of ids [B, n], read chunk by chunk."""
    tokens = []
    for start in range(0, ids.shape[1], CHUNK):
        tokens.append(run_chunk(model, ids[:, start : start + CHUNK], start, session).argmax(-1))
        session.advance(tokens[-1].shape[1])
    return torch.cat(tokens, 1)


def _step(model: Any, token: Tensor, session: Session) -> Tensor:
    logits = run_chunk(model, token, session.position, session)
    session.advance(1)
    return logits[:, -1:].argmax(-1)

