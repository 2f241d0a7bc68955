"""Record formats that were tried: fake quantization in float32 of the same algebra, one switch per question.

What won lives in kvarn/closed.py; these exist to show what the alternatives cost. Tiles are in the store frame.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvarn import float8
from kvarn.closed import GAUSSIAN_STEP
from kvarn.hadamard import rotate
from kvarn_compile.eval.methods.base import Facts, Method


@dataclass(frozen=True)
class Format:
    """Switches of one variant; the defaults are the record the kernels started from.

    ks, kt, vt, exact: storage of the key step, key token scale, value token scale and exact rows.
    exact_rows: tokens of smallest |V| kept; exact_keys: their key rows too; sink: first tokens of the sequence kept.
    power: power steps on m; directions: how many directions m; vs: value channel scale.
    gain: "unbiased" <Z,Z>/<Z,c>, "mse" <Z,c>/<c,c> or "norm" sqrt(<Z,Z>/<c,c>).
    """

    k_bits: int = 4
    v_bits: int = 2
    k_group: int = 128
    v_group: int = 128
    ks: str = "e4m3"
    kt: str = "fp16"
    k_method: str = "rms"
    vt: str = "e4m3"
    exact: str = "fp16"
    exact_rows: int = 1
    exact_keys: bool = False
    sink: int = 0
    power: int = 0
    directions: int = 1
    vs: bool = False
    gain: str = "unbiased"
    step: float = 1.0
    rotate_keys: bool = True
    v_plain: bool = False
    balance: str = "random"


class Variant(Method):
    """A Format over the harness; `balances` maps a balance source to scales per layer."""

    source = "benchmarks/accuracy/variants.py"

    def __init__(self, name: str, facts: Facts, form: Format, balances: dict[str, dict[int, Tensor]]):
        super().__init__(name, facts)
        self.form, self.balances = form, balances

    def store(self, layer, k, v, start):
        form = self.form
        scale = self.balances[form.balance].get(layer) if form.balance != "none" else None
        scale = torch.ones(k.shape[1], k.shape[-1], device=k.device) if scale is None else scale.to(k.device)
        turn = rotate if form.rotate_keys else (lambda x: x)
        ky, vy = turn(k * scale[:, None]), rotate(v)
        norm = vy.unflatten(2, (-1, form.v_group)).square().sum(-1)
        at = norm.topk(max(form.exact_rows, 1), -1, largest=False).indices
        k_hat = keys(ky, at, form)
        v_hat = values(vy.unflatten(2, (-1, form.v_group)), at, form).flatten(2, 3)
        k_hat, v_hat = turn(k_hat) / scale[:, None], rotate(v_hat)
        if start == 0 and form.sink:
            k_hat[:, :, : form.sink], v_hat[:, :, : form.sink] = k[:, :, : form.sink], v[:, :, : form.sink]
        return k_hat, v_hat

    def bytes_per_head(self, tokens):
        d, f = self.facts.shape.head_dim, self.form
        size = {"e4m3": 1, "fp16": 2, "int8": 1}
        tile_k = d * (size[f.ks] + 2) / f.k_group + size[f.kt]
        row = d * size[f.exact] * f.exact_rows * (1 + f.exact_keys) + 2 * f.exact_rows
        tile_v = (row + f.directions * d + 2 * d * f.vs + 12) / f.v_group + size[f.vt] + f.directions
        return tokens * (d * (f.k_bits + f.v_bits) / 8 + tile_k + tile_v) + 128 * (2 * d + 4)


def keys(y: Tensor, at: Tensor, form: Format) -> Tensor:
    """Keys [B, H, n, D] through (q * ks + kz) * kt; `at` [B, H, n / v_group, r] are the exact tokens."""
    top = 2**form.k_bits - 1
    kept = torch.zeros(y.shape[:3], dtype=torch.bool, device=y.device).unflatten(2, (-1, form.v_group))
    if form.exact_keys and form.exact_rows:
        kept.scatter_(-1, at, True)
    kept = kept.flatten(2, 3)[..., None].unflatten(2, (-1, form.k_group))
    y = y.unflatten(2, (-1, form.k_group))
    kt = store(y.square().mean(-1, keepdim=True).sqrt(), form.kt)
    u = y / kt.clamp_min(1e-20)
    low = u.masked_fill(kept, torch.inf).amin(-2, keepdim=True).half().float()
    step = (u.masked_fill(kept, -torch.inf).amax(-2, keepdim=True) - low).clamp_min(0) / top
    if form.ks == "e4m3":
        step = _upward(step * 64).float() / 64
    else:
        step = float8.upward_half(step).float()
    out = (((u - low) / step.clamp_min(1e-20)).round().clamp(0, top) * step + low) * kt
    return torch.where(kept, keep(y, form.exact), out).flatten(2, 3)


def values(v: Tensor, at: Tensor, form: Format) -> Tensor:
    """Values [B, H, T, G, D] through code * vt + sum of w m, exact rows kept."""
    half = (2**form.v_bits - 1) / 2
    if form.v_plain:
        return _plain(v, form.v_bits)
    channel = _rms(v / _rms(v, -1), -2).half().float() if form.vs else torch.ones_like(v[..., :1, :])
    x = v / channel
    z, smooth = x, torch.zeros_like(x)
    for m in _directions(x, form):
        w = (z @ m[..., None]) / m.square().sum(-1)[..., None, None].clamp_min(1e-30)
        if form.exact_rows:
            w = w.scatter(-2, at[..., None], 0)
        unit = w.abs().amax(-2, keepdim=True).clamp_min(1e-30) / 448
        part = float8.nearest(w / unit).float() * unit * m[..., None, :]
        z, smooth = z - part, smooth + part
    step = _rms(z, -1) * GAUSSIAN_STEP[form.v_bits] * form.step
    codes = (z / step.clamp_min(1e-20)).floor().add(0.5).clamp(-half, half)
    zz, zc, cc = ((a * b).sum(-1, keepdim=True) for a, b in ((z, z), (z, codes), (codes, codes)))
    gain = {"unbiased": zz / zc.clamp_min(1e-30), "mse": zc / cc, "norm": (zz / cc).sqrt()}[form.gain]
    if form.exact_rows:
        gain = gain.scatter(-2, at[..., None], 0)
    if form.vt == "e4m3":
        unit = gain.amax(-2, keepdim=True).clamp_min(1e-30) / 448
        gain = float8.nearest(gain / unit).float() * unit
    else:
        gain = gain.half().float()
    out = (codes * gain + smooth) * channel
    if form.exact_rows:
        index = at[..., None].expand(*at.shape, v.shape[-1])
        out = out.scatter(-2, index, keep(v.gather(-2, index), form.exact))
    return out


def _directions(x: Tensor, form: Format) -> list[Tensor]:
    """The directions m [..., D], e4m3 rounded."""
    if not form.directions:
        return []
    unit = x / x.norm(dim=-1, keepdim=True).clamp_min(1e-20)
    m = unit.mean(-2)
    for _ in range(form.power):
        m = m / m.norm(dim=-1, keepdim=True).clamp_min(1e-20)
        m = ((unit @ m[..., None]) * unit).mean(-2)
    found = [_e4m3_vector(m)]
    for _ in range(form.directions - 1):
        first = found[0] / found[0].norm(dim=-1, keepdim=True).clamp_min(1e-20)
        rest = unit - (unit @ first[..., None]) * first[..., None, :]
        m = rest[..., ::2, :].mean(-2) - rest[..., 1::2, :].mean(-2)
        for _ in range(4):
            m = m / m.norm(dim=-1, keepdim=True).clamp_min(1e-20)
            m = ((rest @ m[..., None]) * rest).mean(-2)
        found.append(_e4m3_vector(m))
    return found


def _e4m3_vector(m: Tensor) -> Tensor:
    unit = m.abs().amax(-1, keepdim=True).clamp_min(1e-30) / 448
    return float8.nearest(m / unit).float() * unit


def _plain(v: Tensor, bits: int) -> Tensor:
    """Asymmetric rounding to nearest per token, float16 step and minimum."""
    low = v.amin(-1, keepdim=True).half().float()
    step = ((v.amax(-1, keepdim=True) - low) / (2**bits - 1)).half().float()
    return ((v - low) / step.clamp_min(1e-20)).round().clamp(0, 2**bits - 1) * step + low


def keep(x: Tensor, how: str) -> Tensor:
    """Exact rows as they are stored."""
    if how == "fp16":
        return x.half().float()
    scale = (x.abs().amax(-1, keepdim=True) / 127).half().float()
    return (x / scale.clamp_min(1e-20)).round() * scale


def store(x: Tensor, how: str) -> Tensor:
    """A positive token scale as it is stored."""
    return x.half().float() if how == "fp16" else float8.nearest(x).float()


def _rms(x: Tensor, dim: int) -> Tensor:
    return x.square().mean(dim, keepdim=True).sqrt().clamp_min(1e-20)


BASE = Format()


def question(**changes) -> Format:
    """The base format with some switches changed."""
    return replace(BASE, **changes)


def _upward(x):
    """Non-negative x rounded up to an e4m3 value, saturating at 448."""
    y = float8.nearest(x)
    bits = y.view(torch.uint8)
    short = (y.float() < x) & (bits < 0x7E)  # 0x7E is 448, the next pattern is NaN
    return (bits + short.to(torch.uint8)).view(torch.float8_e4m3fn)
