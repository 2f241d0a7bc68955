"""Small language models in the three ways people write KV caches, plus the variants a rewrite must tell apart.

All share `Config` and take ids [B, n]. They hold caches as the original code bases do: transformers' StaticLayer
objects passed as an argument, gpt-fast's buffers, the Llama reference's plain attributes.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Config:
    """Sizes of a toy model; heads // kv_heads is the GQA group."""

    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    layers: int = 2
    capacity: int = 320
    batch: int = 1
    vocab: int = 97
    bias: bool = False
    dtype: torch.dtype = torch.float32

    @property
    def hidden(self) -> int:
        return self.heads * self.head_dim

    def cache(self, order: str = "bhsd") -> Tensor:
        sizes = {"b": self.batch, "h": self.kv_heads, "s": self.capacity, "d": self.head_dim}
        return torch.zeros([sizes[axis] for axis in order], dtype=self.dtype)


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class Rope(nn.Module):
    """Rotary embedding over half-split pairs; cos and sin [n, D] (or [B, n, D]) from positions."""

    def __init__(self, config: Config):
        super().__init__()
        inv_freq = 1.0 / 10000 ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
        self.register_buffer("inv_freq", inv_freq, persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].float() * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(dtype), angles.sin().to(dtype)


class RMSNorm(nn.Module):
    def __init__(self, size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def repeat_kv(x: Tensor, repeats: int) -> Tensor:
    """[B, H, S, D] -> [B, H * repeats, S, D], each head `repeats` times in a row."""
    b, h, s, d = x.shape
    return x if repeats == 1 else x[:, :, None].expand(b, h, repeats, s, d).reshape(b, h * repeats, s, d)


class StaticLayer:
    """One layer's cache as transformers keeps it: [B, H, S, D], written at a counter that is itself a tensor."""

    def __init__(self, config: Config):
        self.keys, self.values = config.cache(), config.cache()
        self.cumulative_length = torch.tensor(0)

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        n = k.shape[-2]
        positions = torch.arange(n, device=k.device) + self.cumulative_length
        self.cumulative_length.add_(n)
        self.keys.index_copy_(2, positions, k)
        self.values.index_copy_(2, positions, v)
        return self.keys, self.values


class DynamicLayer(StaticLayer):
    """A cache that grows by concatenation."""

    def __init__(self, config: Config):
        self.keys, self.values = config.cache()[:, :, :3].clone(), config.cache()[:, :, :3].clone()
        self.cumulative_length = torch.tensor(3)

    def update(self, k, v):
        self.keys, self.values = torch.cat([self.keys, k], dim=-2), torch.cat([self.values, v], dim=-2)
        return self.keys, self.values


class RollingLayer(StaticLayer):
    """A full sliding window of one new token a step: everything moves by one, the new token comes last."""

    def update(self, k, v):
        index = torch.tensor([-1])
        for cache, new in ((self.keys, k), (self.values, v)):
            rolled = cache.roll(-1, dims=-2)
            rolled[:, :, index] = new
            cache.copy_(rolled)
        return self.keys, self.values


class FusedLayer(StaticLayer):
    """K and V in one tensor [2, B, H, S, D]."""

    def __init__(self, config: Config):
        self.both = torch.stack([config.cache(), config.cache()])
        self.cumulative_length = torch.tensor(0)

    def update(self, k, v):
        positions = torch.arange(k.shape[-2]) + self.cumulative_length
        self.cumulative_length.add_(k.shape[-2])
        self.both[0, :, :, positions] = k
        self.both[1, :, :, positions] = v
        return self.both[0], self.both[1]


def sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])


def repeat_sdpa_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    repeats = q.shape[1] // k.shape[1]
    return F.scaled_dot_product_attention(q, repeat_kv(k, repeats), repeat_kv(v, repeats), attn_mask=mask)


def wrong_repeat_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Repeats the heads as a block, which pairs query heads with other KV heads than a GQA group does."""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat(1, repeats, 1, 1), v.repeat(1, repeats, 1, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def eager_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attention written out as transformers' "eager" does it, softmax in float32."""
    repeats = q.shape[1] // k.shape[1]
    scores = torch.matmul(q, repeat_kv(k, repeats).transpose(2, 3)) * (q.shape[-1] ** -0.5)
    if mask is not None:
        if mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, torch.finfo(q.dtype).min).to(q.dtype)
        scores = scores + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.matmul(F.dropout(weights, p=0.1, training=False), repeat_kv(v, repeats))


class HFAttention(nn.Module):
    def __init__(self, config: Config, attention=sdpa_attention, shared: bool = False):
        super().__init__()
        self.config, self.attention, self.shared = config, attention, shared
        kv = config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden, config.hidden, bias=config.bias)
        if not shared:
            self.k_proj = nn.Linear(config.hidden, kv, bias=config.bias)
            self.v_proj = nn.Linear(config.hidden, kv, bias=config.bias)
        self.o_proj = nn.Linear(config.hidden, config.hidden, bias=False)

    def forward(self, x, cos, sin, layer, mask):
        split = (*x.shape[:-1], -1, self.config.head_dim)
        q = self.q_proj(x).view(split).transpose(1, 2)
        q = q * cos + rotate_half(q) * sin
        if self.shared:
            k, v = layer.keys, layer.values
        else:
            k, v = self.k_proj(x).view(split).transpose(1, 2), self.v_proj(x).view(split).transpose(1, 2)
            k, v = layer.update(k * cos + rotate_half(k) * sin, v)
        out = self.attention(q, k, v, mask)
        return self.o_proj(out.transpose(1, 2).reshape(*x.shape[:-1], -1))


class HFModel(nn.Module):
    """transformers' shape of model: cache layers come as an argument, one StaticLayer each.

    share: layers from the second on attend to the first layer's cache (as Gemma 3n does).
    """

    def __init__(self, config: Config, attention=sdpa_attention, share: bool = False):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.hidden)
        self.rope = Rope(config)
        self.norms = nn.ModuleList(RMSNorm(config.hidden) for _ in range(config.layers))
        self.layers = nn.ModuleList(
            HFAttention(config, attention, shared=share and i > 0) for i in range(config.layers))
        self.share = share
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)

    def new_cache(self, kind=StaticLayer) -> list:
        return [kind(self.config) for _ in range(1 if self.share else self.config.layers)]

    def forward(self, ids: Tensor, cache: list) -> Tensor:
        x = self.embed(ids)
        n, length = ids.shape[1], cache[0].cumulative_length
        positions = torch.arange(n, device=ids.device) + length
        cos, sin = self.rope(positions, x.dtype)
        tokens = self.config.capacity
        if type(cache[0]) is DynamicLayer:
            tokens = cache[0].keys.shape[-2] + n
        mask = (torch.arange(tokens, device=ids.device) <= positions[:, None])[None, None]
        for i, (norm, layer) in enumerate(zip(self.norms, self.layers, strict=True)):
            x = x + layer(norm(x), cos, sin, cache[0 if self.share else i], mask)
        return self.head(x)


class GptFastCache(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.register_buffer("k_cache", config.cache())
        self.register_buffer("v_cache", config.cache())

    def update(self, input_pos, k, v):
        k_out, v_out = self.k_cache, self.v_cache
        if input_pos.ndim == 1:
            k_out[:, :, input_pos] = k
            v_out[:, :, input_pos] = v
        else:  # a position per row: [B, n]
            rows = torch.arange(k.shape[0])[:, None]
            k_out[rows, :, input_pos] = k.transpose(1, 2)
            v_out[rows, :, input_pos] = v.transpose(1, 2)
        return k_out, v_out


class GptFast(nn.Module):
    """gpt-fast: caches are buffers, positions an argument ([n], or [B, n] for one position per row), a bool mask."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        kv = config.kv_heads * config.head_dim
        self.embed = nn.Embedding(config.vocab, config.hidden)
        self.rope = Rope(config)
        self.wqkv = nn.ModuleList(
            nn.Linear(config.hidden, config.hidden + 2 * kv, bias=False) for _ in range(config.layers))
        self.caches = nn.ModuleList(GptFastCache(config) for _ in range(config.layers))
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)
        self.register_buffer("causal_mask", torch.tril(torch.ones(config.capacity, config.capacity, dtype=torch.bool)))

    def forward(self, ids: Tensor, input_pos: Tensor) -> Tensor:
        c, x = self.config, self.embed(ids)
        cos, sin = self.rope(input_pos, x.dtype)
        mask = self.causal_mask[input_pos]
        mask = mask[None, None] if input_pos.ndim == 1 else mask[:, None]
        if input_pos.ndim == 2:
            cos, sin = cos[:, None], sin[:, None]
        kv = c.kv_heads * c.head_dim
        for wqkv, cache in zip(self.wqkv, self.caches, strict=True):
            q, k, v = wqkv(x).split([c.hidden, kv, kv], dim=-1)
            q = q.view(*x.shape[:-1], c.heads, c.head_dim).transpose(1, 2)
            k = k.view(*x.shape[:-1], c.kv_heads, c.head_dim).transpose(1, 2)
            v = v.view(*x.shape[:-1], c.kv_heads, c.head_dim).transpose(1, 2)
            q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
            k, v = cache.update(input_pos, k, v)
            repeats = c.heads // c.kv_heads
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=0.0)
            x = x + out.transpose(1, 2).contiguous().view(x.shape)
        return self.head(x)


class LlamaAttention(nn.Module):
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        kv = config.kv_heads * config.head_dim
        self.wq = nn.Linear(config.hidden, config.hidden, bias=False)
        self.wk = nn.Linear(config.hidden, kv, bias=False)
        self.wv = nn.Linear(config.hidden, kv, bias=False)
        self.wo = nn.Linear(config.hidden, config.hidden, bias=False)
        self.cache_k, self.cache_v = config.cache("bshd"), config.cache("bshd")

    def forward(self, x: Tensor, start: int, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        c = self.config
        bsz, n, _ = x.shape
        xq = self.wq(x).view(bsz, n, c.heads, c.head_dim)
        xk = self.wk(x).view(bsz, n, c.kv_heads, c.head_dim)
        xv = self.wv(x).view(bsz, n, c.kv_heads, c.head_dim)
        cos, sin = cos[:, None], sin[:, None]
        xq, xk = xq * cos + rotate_half(xq) * sin, xk * cos + rotate_half(xk) * sin
        self.cache_k = self.cache_k.to(xq)
        self.cache_v = self.cache_v.to(xq)
        self.cache_k[:bsz, start : start + n] = xk
        self.cache_v[:bsz, start : start + n] = xv
        keys, values = self.cache_k[:bsz, : start + n], self.cache_v[:bsz, : start + n]
        repeats = c.heads // c.kv_heads
        if repeats > 1:
            keys, values = (t[:, :, :, None, :].expand(*t.shape[:3], repeats, c.head_dim)
                            .reshape(bsz, start + n, c.heads, c.head_dim) for t in (keys, values))
        xq, keys, values = xq.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        scores = torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(c.head_dim)
        if mask is not None:
            scores = scores + mask
        scores = F.softmax(scores.float(), dim=-1).type_as(xq)
        return self.wo(torch.matmul(scores, values).transpose(1, 2).contiguous().view(bsz, n, -1))


class Llama(nn.Module):
    """The Llama reference: [B, S, H, D] caches as attributes, an int start position, attention written out."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab, config.hidden)
        self.rope = Rope(config)
        self.layers = nn.ModuleList(LlamaAttention(config) for _ in range(config.layers))
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)

    def forward(self, ids: Tensor, start: int) -> Tensor:
        x, n = self.embed(ids), ids.shape[1]
        cos, sin = self.rope(torch.arange(start, start + n, device=ids.device), x.dtype)
        mask = None
        if n > 1:
            mask = torch.triu(torch.full((n, n), float("-inf")), diagonal=1)
            mask = torch.hstack([torch.zeros((n, start)), mask]).to(x.dtype)
        for layer in self.layers:
            x = x + layer(x, start, cos, sin, mask)
        return self.head(x)
