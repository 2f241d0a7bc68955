"""PackedCache: one layer's KV cache in packed form, as an object. The ops (ops.py) work on its four tensors."""

import torch
from torch import Tensor

import kvarn.ops  # noqa: F401  (defines torch.ops.kvarn)
from kvarn.errors import PositionError, ShapeError
from kvarn.frame import keys_out, unit_balance, values_out
from kvarn.layout import StoreLayout
from kvarn.quantize import decode, read_tail
from kvarn.spec import QuantSpec, resolve

_POSITIONS_AT_ONCE = 1024
"""Positions of a plain cache looked at together: importing one must not need memory of its size."""


class PackedCache:
    """The packed K and V of one attention layer: B rows, H KV heads, `capacity` positions.

    Attributes:
        records: [B, H, T, record_bytes] uint8, T = ceil(capacity / G) tiles.
        tail: [B, H, tail_bytes] uint8, the open tile of each row.
        lengths: [B] int64, last written position + 1.
        balance: [H, D] float32, the key scale of balanced keys.
        spec, layout, capacity: what is stored, where its bytes lie, how many positions.
    """

    def __init__(self, records: Tensor, tail: Tensor, lengths: Tensor, balance: Tensor, layout: StoreLayout,
                 capacity: int):
        self.records, self.tail, self.lengths, self.balance = records, tail, lengths, balance
        self.layout, self.capacity = layout, capacity

    @classmethod
    def empty(cls, spec: QuantSpec | str, rows: int, heads: int, capacity: int, head_dim: int, dtype: torch.dtype,
              device: torch.device | str = "cpu", balance: Tensor | None = None) -> "PackedCache":
        """A store that reads as zeros.

        Args:
            spec: a QuantSpec or preset name.
            rows, heads, capacity, head_dim: B, H, positions, D.
            dtype: the plain cache's dtype: float16, bfloat16 or float32.
            balance: [H, D] float32, or None for ones.

        Raises:
            SpecError, ShapeError: for a preset, head_dim or dtype that has no layout, or a balance of another shape.
        """
        layout = StoreLayout(resolve(spec), head_dim, dtype)
        if balance is not None and balance.shape != (heads, head_dim):
            raise ShapeError(f"balance {tuple(balance.shape)}; valid: {(heads, head_dim)}")
        balance = unit_balance(heads, head_dim, device) if balance is None else balance.to(device, torch.float32)
        shape = (rows, heads, layout.tiles(capacity), layout.record_bytes)
        records = torch.zeros(shape, dtype=torch.uint8, device=device)
        tail = torch.zeros(rows, heads, layout.tail_bytes, dtype=torch.uint8, device=device)
        lengths = torch.zeros(rows, dtype=torch.int64, device=device)
        if records.is_cuda and layout.spec.method == "kvarn":
            from kvarn.decode_cuda import signs  # Triton is needed only where there is a GPU

            signs(layout, records.device)
        return cls(records, tail, lengths, balance.contiguous(), layout, capacity)

    @property
    def spec(self) -> QuantSpec:
        """What is stored."""
        return self.layout.spec

    @property
    def dtype(self) -> torch.dtype:
        """The plain cache's dtype."""
        return self.layout.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of records, tail and lengths (balance, a constant of the model, is not counted)."""
        return self.records.nbytes + self.tail.nbytes + self.lengths.nbytes

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(records, tail, lengths, balance), in the order ops take them."""
        return self.records, self.tail, self.lengths, self.balance

    def append(self, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Write k, v [B', H, n, D] at positions [n] or [B', n]; see kvarn/append.py."""
        torch.ops.kvarn.append(k, v, positions, *self.tensors(), self.capacity, self.spec.key)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, mask: Tensor | None = None,
               kv_len: int | None = None, is_causal: bool = False, scale: float | None = None) -> Tensor:
        """Attention of q [B', Hq, n, D] after the append of k, v at positions; see kvarn/attention.py."""
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        return torch.ops.kvarn.attend(q, k, v, positions, *self.tensors(), mask,
                                      self.capacity if kv_len is None else kv_len, is_causal, scale, self.spec.key)

    def load(self, k: Tensor, v: Tensor) -> None:
        """Replace the content by a plain cache's, k and v [B, H, S, D], S <= capacity.

        lengths become the last position with a non-zero key or value + 1: zeros beyond it read the same either way.
        """
        if k.shape != v.shape or k.shape[2] > self.capacity:
            raise ShapeError(f"k {tuple(k.shape)}, v {tuple(v.shape)}; valid: equal, at most {self.capacity} positions")
        self.reset()
        pieces = zip(k.split(_POSITIONS_AT_ONCE, 2), v.split(_POSITIONS_AT_ONCE, 2), strict=True)
        used = torch.cat([((a != 0) | (b != 0)).any(-1).any(1) for a, b in pieces], 1)
        ends = torch.where(used, torch.arange(1, k.shape[2] + 1, device=k.device), 0).amax(1)
        for row, end in enumerate(ends.tolist()):
            one = slice(row, row + 1)
            torch.ops.kvarn.append(k[one, :, :end], v[one, :, :end], torch.arange(end, device=k.device),
                                   self.records[one], self.tail[one], self.lengths[one], self.balance, self.capacity,
                                   self.spec.key)

    def unpack(self) -> tuple[Tensor, Tensor]:
        """The content as plain k, v [B, H, capacity, D] in the cache's dtype."""
        k, v = decode(self.records, self.layout)
        k, v = k.clone(), v.clone()
        if self.spec.sink:
            k[:, :, 0], v[:, :, 0] = (self.layout.tail[name].of(self.tail) for name in ("sink_k", "sink_v"))
        rows = torch.arange(k.shape[0], device=k.device)
        opened = (self.lengths - 1).clamp_min(0) // self.spec.group
        tail_k, tail_v = read_tail(self.tail, self.layout)
        k[rows, :, opened], v[rows, :, opened] = tail_k.to(k.dtype), tail_v.to(v.dtype)
        k, v = k.flatten(2, 3)[:, :, : self.capacity], v.flatten(2, 3)[:, :, : self.capacity]
        return keys_out(k, self.balance, self.layout), values_out(v, self.layout).to(self.dtype)

    def truncate(self, length: int) -> None:
        """Make positions from `length` on read as zeros: they are overwritten before they are seen again.

        Raises:
            PositionError: if `length` is negative or beyond the capacity.
        """
        if not 0 <= length <= self.capacity:
            raise PositionError(f"length {length}; valid: 0..{self.capacity}")
        k, v = self.unpack()
        k[:, :, length:], v[:, :, length:] = 0, 0
        self.load(k, v)

    def reset(self) -> None:
        """Make everything read as zeros."""
        for tensor in (self.records, self.tail, self.lengths):
            tensor.zero_()

    def reorder(self, rows: Tensor) -> None:
        """Row b becomes what row rows[b] was (beam search); rows [B] int64."""
        for tensor in (self.records, self.tail, self.lengths):
            tensor.copy_(tensor.index_select(0, rows))
