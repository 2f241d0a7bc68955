"""Where every byte of a packed KV cache lies. The only file that knows offsets.

Three tensors hold one layer's cache (B rows, H KV heads, T = ceil(capacity / G) tiles, D = head dim, G = tile length):

    records  [B, H, T, record_bytes] uint8   one record a tile: codes of K and V, then scales
    tail     [B, H, tail_bytes] uint8        the open tile's tokens (and upstream's sink tile), not yet rounded to codes
    lengths  [B] int64                       last written position + 1; the open tile is tile max(length - 1, 0) // G

Everything is stored in the *store frame*: K * balance rotated by the orthonormal Hadamard matrix, V rotated by it
(method "raw": the identity). A store of zero bytes reads as zeros, so an untouched store equals an untouched cache.

Codes are planar: with b bits, a byte of K holds channels j, j + D*b/8, j + 2*D*b/8, ... of one token, lowest bits
first; a byte of V likewise, transposed, so that both are contiguous along the axis a matrix product sums over. 3 bits
are a 2-bit plane group followed by a 1-bit one. Along that axis the second and third byte of every four are exchanged:
the even and the odd bytes of a 32-bit word are what one mask each takes out of it as a pair of 16-bit numbers.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import torch

from kvarn.errors import ShapeError
from kvarn.spec import HEAD_DIMS, QuantSpec

ALIGN = 16
"""Every field starts at a multiple of this many bytes: one 16-byte load per thread on a GPU."""


@dataclass(frozen=True)
class Field:
    """A typed array inside a record or the tail: byte offset, shape, dtype.

    A `step` > 0 is the distance in bytes of one entry from the next, for a vector [n] interleaved with others.
    """

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    step: int = 0

    @property
    def nbytes(self) -> int:
        """Its size in bytes, gaps included."""
        return prod(self.shape) * (self.step or self.dtype.itemsize)

    def of(self, buffer: torch.Tensor) -> torch.Tensor:
        """The field's view [..., *shape] of a uint8 `buffer` [..., bytes]; writes go through."""
        flat = buffer[..., self.offset : self.offset + self.nbytes]
        if self.step:
            return flat.unflatten(-1, (-1, self.step))[..., : self.dtype.itemsize].view(self.dtype)[..., 0]
        return flat.view(self.dtype).unflatten(-1, self.shape)


@dataclass(frozen=True)
class StoreLayout:
    """Byte layout of the records and the tail for one spec, head dimension and cache dtype.

    Raises:
        ShapeError: if the head dimension or dtype has no layout under this spec.
    """

    spec: QuantSpec
    head_dim: int
    dtype: torch.dtype

    def __post_init__(self):
        if self.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise ShapeError(f"cache dtype {self.dtype}; valid: float16, bfloat16, float32")
        if self.spec.rotated and self.head_dim not in HEAD_DIMS:
            raise ShapeError(f"head_dim={self.head_dim}: rotation needs a power of two; valid: {HEAD_DIMS}, "
                             "or any head_dim with preset 'k16v16'")

    @cached_property
    def record(self) -> dict[str, Field]:
        """The fields of one record by name.

        raw:      k, v [G, D] in the cache's dtype.
        kvarn:    k_codes, v_codes; scalars float32 = (vt unit, w unit, then k scale and v scale of each exact token);
                  channel [D], a 32-bit word of ks and kz each; token [G], a word of kt, vt and w each (vt in 16 bits
                  if v_bits > 2: then w is apart); m [D]; exact [E, D], the exact tokens as the tail holds tokens
                  (words.py), and exact_at [E]. An exact token's kt is -0.0, its vt and w are 0.
        upstream: k_codes, v_codes; ks, kz [D], kt [G]; vt, vz [G], vs [D].
        """
        g, d, spec = self.spec.group, self.head_dim, self.spec
        half, e4m3, u8 = torch.float16, torch.float8_e4m3fn, torch.uint8
        if spec.method == "raw":
            return _pack({"k": ((g, d), self.dtype), "v": ((g, d), self.dtype)})
        codes = {"k_codes": ((g, d * spec.k_bits // 8), u8), "v_codes": ((d * spec.v_bits // 8, g), u8)}
        if spec.method == "upstream":
            scales = {"ks": ((d,), half), "kz": ((d,), half), "kt": ((g,), half),
                      "vt": ((g,), half), "vz": ((g,), half), "vs": ((d,), half)}
        else:
            scales = {"scalars": ((2 + 2 * spec.exact_rows,), torch.float32), "channel": ((d,), torch.int32),
                      "token": ((g,), torch.int32), "m": ((d,), e4m3)}
            if spec.v_bits > 2:
                scales["w"] = ((g,), e4m3)
            if spec.exact_rows:
                scales |= {"exact": ((spec.exact_rows, d), torch.int16), "exact_at": ((spec.exact_rows,), u8)}
            return _word_fields(_pack(codes | scales), wide_vt=spec.v_bits > 2)
        return _pack(codes | scales)

    @cached_property
    def tail(self) -> dict[str, Field]:
        """The fields of one head's tail by name.

        tail_bits 8:  words int16 [G, D] of a key and a value each (words.py), per-token scales k_scale, v_scale
                      float16 [G].
        tail_bits 16: k, v [G, D] in the cache's dtype. With a sink: sink_k, sink_v likewise.
        """
        g, d = self.spec.group, self.head_dim
        if self.spec.tail_bits == 8:
            fields = {"words": ((g, d), torch.int16), "k_scale": ((g,), torch.float16),
                      "v_scale": ((g,), torch.float16)}
        else:
            fields = {"k": ((g, d), self.dtype), "v": ((g, d), self.dtype)}
        if self.spec.sink:
            fields |= {"sink_k": ((g, d), self.dtype), "sink_v": ((g, d), self.dtype)}
        return _pack(fields)

    @property
    def value_bits(self) -> int:
        """Bits of a value in a word of a key and a value (words.py); the key has the other of 16."""
        return 8 if self.spec.v_bits == 8 else 6

    @cached_property
    def record_bytes(self) -> int:
        """Bytes of one tile of one head."""
        return _end(self.record)

    @cached_property
    def tail_bytes(self) -> int:
        """Bytes of one row's tail for one head."""
        return _end(self.tail)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one token of one head, K and V and scales, without the tail."""
        return self.record_bytes / self.spec.group

    def tiles(self, tokens: int) -> int:
        """Tiles that hold `tokens` tokens."""
        return -(-tokens // self.spec.group)

    def nbytes(self, rows: int, heads: int, capacity: int) -> int:
        """All bytes of a store of this layout: records, tail and lengths."""
        return rows * (heads * (self.tiles(capacity) * self.record_bytes + self.tail_bytes) + 8)


@lru_cache(maxsize=256)
def store_layout(key: str, head_dim: int, dtype: torch.dtype) -> StoreLayout:
    """The layout for a spec key (QuantSpec.key), cached: ops look it up on every call."""
    return StoreLayout(QuantSpec.from_key(key), head_dim, dtype)


def _pack(fields: dict[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Field]:
    packed, offset = {}, 0
    for name, (shape, dtype) in fields.items():
        packed[name] = Field(offset, shape, dtype)
        offset += -(-packed[name].nbytes // ALIGN) * ALIGN
    return packed


def _word_fields(fields: dict[str, Field], wide_vt: bool) -> dict[str, Field]:
    """The scales inside the channel and token words. Codes of more than 2 bits resolve finer than an e4m3 vt."""
    half, e4m3, channel, token = torch.float16, torch.float8_e4m3fn, fields["channel"], fields["token"]
    parts = {"ks": Field(channel.offset, channel.shape, half, step=4),
             "kz": Field(channel.offset + 2, channel.shape, half, step=4),
             "kt": Field(token.offset, token.shape, half, step=4),
             "vt": Field(token.offset + 2, token.shape, half if wide_vt else e4m3, step=4),
             "w": Field(token.offset + 3, token.shape, e4m3, step=4)}
    return parts | fields


def _end(fields: dict[str, Field]) -> int:
    end = max(f.offset + f.nbytes for f in fields.values())
    return -(-end // ALIGN) * ALIGN
