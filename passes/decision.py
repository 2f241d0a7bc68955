"""What a rewrite reports: the stores it made and one decision per attention it found."""

from dataclasses import dataclass

from kvarn.spec import QuantSpec

from .refusal import Refusal


@dataclass(frozen=True)
class CacheAxes:
    """Which dimension of the plain cache tensor is which. transformers: 0, 1, 2, 3; the Llama reference: 0, 2, 1, 3."""

    batch: int
    heads: int
    tokens: int
    channels: int

    @property
    def order(self) -> tuple[int, int, int, int]:
        """The permutation that brings a plain cache to [B, H, S, D]."""
        return self.batch, self.heads, self.tokens, self.channels


@dataclass(frozen=True)
class BalanceSource:
    """The graph inputs a layer's key balance can be computed from (indices among the original placeholders).

    Attributes:
        weight: the key projection's weight [H*D, hidden].
        bias: its bias [H*D].
        inv_freq: the rotary angular frequencies [D/2], None if they are not an input.
        norm: the weight of the RMS norm that feeds the projection [hidden], None if there is none.
        query_weight, query_bias: [Hq*D, hidden] and [Hq*D] of the query projection, None if queries are made otherwise.
    """

    weight: int
    bias: int
    inv_freq: int | None = None
    norm: int | None = None
    query_weight: int | None = None
    query_bias: int | None = None


@dataclass(frozen=True)
class StorePair:
    """A K cache and a V cache that became one store.

    Attributes:
        key_input, value_input: indices of the plain caches among the original placeholders.
        axes: the dimensions of the plain cache (K and V agree).
        spec: the store's format.
        balance: inputs to compute the key balance from, None when there is no biased key projection or none is wanted.
        module_path: the module that writes the cache, "" if unknown.
    """

    key_input: int
    value_input: int
    axes: CacheAxes
    spec: QuantSpec
    balance: BalanceSource | None = None
    module_path: str = ""


@dataclass(frozen=True)
class Decision:
    """What happened to one attention.

    Attributes:
        module_path: the module that computes it, from nn_module_stack, e.g. "model.layers.0.self_attn".
        source: the user's source line, "file:line: code".
        kind: "sdpa" or "softmax" (written out by hand).
        cache: the graph's names of the K and V cache inputs, "" if none were found.
        shape: the plain cache's sizes in its own dimension order, symbols as text.
        accepted: True if it was rewritten.
        refusal: why not, None if accepted.
        pair: index into Rewritten.pairs, None if refused.
    """

    module_path: str
    source: str
    kind: str
    cache: str
    shape: tuple[int | str, ...]
    accepted: bool
    refusal: Refusal | None = None
    pair: int | None = None


@dataclass(frozen=True)
class Rewritten:
    """The result of `rewrite`.

    The rewritten graph takes the original inputs numbered `kept`, then records, tail, lengths and balance of each pair.
    """

    pairs: tuple[StorePair, ...]
    decisions: tuple[Decision, ...]
    kept: tuple[int, ...]
