import pytest
import torch

from kvarn_compile.decode import Generated, greedy, stream


def counter(calls):
    """A model that says: the next token is this one's successor."""

    def step(ids, positions):
        calls.append((ids.tolist(), positions.tolist()))
        return torch.nn.functional.one_hot((ids + 1) % 10, 10).float()

    return step


def test_positions_and_tokens():
    calls = []
    assert list(greedy(counter(calls), torch.tensor([[3, 4, 5]]), 3)) == [6, 7, 8]
    assert calls == [([[3, 4, 5]], [[0, 1, 2]]), ([[6]], [[3]]), ([[7]], [[4]])]


def test_stops_after_a_stop_token():
    assert list(greedy(counter([]), torch.tensor([[3]]), 9, frozenset([6]))) == [4, 5, 6]


class Bytes:
    """A tokenizer whose tokens are UTF-8 bytes."""

    def decode(self, tokens, skip_special_tokens):
        return bytes(tokens).decode("utf-8", errors="replace")


def test_stream_waits_for_whole_characters():
    pieces = []
    out = stream(iter("é!".encode()), Bytes(), pieces.append)
    assert [p for p in pieces if p] == ["é", "!"] and out.tokens == list("é!".encode())


def test_rate_leaves_the_prompt_out():
    assert Generated([1, 2, 3], [100.0, 101.0, 102.0]).tokens_per_second == pytest.approx(1.0)
    assert Generated([1], [5.0]).tokens_per_second != Generated([1], [5.0]).tokens_per_second  # nan
