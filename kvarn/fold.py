"""Attention of one new token over records without dequantizing them: scales fold into the small operands.

    scores = ((q * ks) codes^T + q kz^T) * kt, but q K[exact]^T of exact tokens
    out    = (P * vt) codes_v - center * sum(P * vt) + sum(P * w) m + P[exact] V[exact]

The tensor products run on raw codes (docs/kernels.md, "The algebra"), as the GPU kernel's do.
"""

import torch
from torch import Tensor

from kvarn.closed import exact_tokens, key_steps, value_scales
from kvarn.layout import StoreLayout
from kvarn.packing import exchange, masked_planes
from kvarn.quantize import read_tail

_TILES_AT_ONCE = 64
"""Tiles (of all rows and heads) whose codes are widened to float32 together: 4 MiB at G = D = 128, a cache's size."""


def attend_one(q: Tensor, records: Tensor, tail: Tensor, opened: Tensor, mask: Tensor | None, tokens: int, scale: float,
               layout: StoreLayout) -> Tensor:
    """Attention of one query token per row, in the store frame.

    Args:
        q: [B, Hq, 1, D] float32; records [B, H, T, record_bytes]; tail [B, H, tail_bytes].
        opened: [B], the tile among these T whose tokens are in the tail (any other value: none of them).
        mask: as in kvarn::attend, over the first `tokens` of the T * G positions.

    Returns:
        [B, Hq, 1, D] float32.
    """
    heads, group = records.shape[1], layout.spec.group
    grouped = q.squeeze(2).unflatten(1, (heads, -1))
    tail_k, tail_v = read_tail(tail, layout)
    rows = ((opened >= 0) & (opened < records.shape[2])).nonzero().flatten()
    pieces = records.split(max(1, _TILES_AT_ONCE // records.shape[:2].numel()), 2)
    scores = torch.cat([_scores(grouped, piece, layout) for piece in pieces], 3)
    scores[rows, :, :, opened[rows]] = (grouped @ tail_k.transpose(-1, -2))[rows]
    weights = _softmax(scores.flatten(-2)[..., :tokens] * scale, mask)
    weights = torch.nn.functional.pad(weights, (0, scores.shape[-2] * group - tokens)).unflatten(-1, (-1, group))
    out = torch.zeros_like(grouped)
    out[rows] = weights[rows, :, :, opened[rows]] @ tail_v[rows]
    weights[rows, :, :, opened[rows]] = 0
    for piece, part in zip(pieces, weights.split(pieces[0].shape[2], 3), strict=True):
        out += _outputs(part, piece, layout)
    return out.flatten(1, 2).unsqueeze(2)


def _scores(q: Tensor, records: Tensor, layout: StoreLayout) -> Tensor:
    """q [B, H, g, D] against the keys of records [B, H, T, record_bytes]: [B, H, g, T, G]."""
    f = layout.record
    folded = q[:, :, None] * key_steps(records, layout)[:, :, :, None]
    scores = (f["kz"].of(records).float() @ q.transpose(-1, -2))[..., None, :]
    for codes, start, factor in masked_planes(f["k_codes"].of(records), layout.spec.k_bits, dim=-1):
        part = exchange(folded[..., start : start + codes.shape[-1]] * factor)
        scores = codes.float() @ part.transpose(-1, -2) + scores
    scores = scores * f["kt"].of(records).float()[..., None]
    if layout.spec.exact_rows:
        exact = exact_tokens(records, layout)[0] @ q.transpose(-1, -2)[:, :, None]
        at = f["exact_at"].of(records).long()[..., None].expand_as(exact)
        scores = scores.scatter(-2, at, exact)
    return scores.permute(0, 1, 4, 2, 3)


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over the last dimension of [B, H, g, S]; a row that sees nothing gives zeros."""
    if mask is None:
        return scores.softmax(-1)
    heads, group = scores.shape[1:3]
    mask = mask.reshape((1,) * (4 - mask.dim()) + mask.shape).squeeze(2)
    mask = mask.unflatten(1, (heads, group)) if mask.shape[1] == heads * group else mask[:, :, None]
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    nothing = (scores == -torch.inf).all(-1, keepdim=True)
    return scores.softmax(-1).masked_fill(nothing, 0.0)  # a NaN of the query stays, as in the plain model


def _outputs(weights: Tensor, records: Tensor, layout: StoreLayout) -> Tensor:
    """weights [B, H, g, T, G] times the values of records: [B, H, g, D]."""
    f, spec = layout.record, layout.spec
    vt, w, m = value_scales(records, layout)
    weights = weights.transpose(2, 3)
    folded = weights * vt[..., None, :]
    out = (weights @ w[..., None])[..., 0].transpose(-1, -2) @ m
    out -= folded.sum((2, 4))[..., None] * ((2**spec.v_bits - 1) / 2)
    folded = exchange(folded).transpose(-1, -2)
    for codes, start, factor in masked_planes(f["v_codes"].of(records), spec.v_bits, dim=-2):
        part = (codes.float() @ folded).sum(2).transpose(-1, -2)
        out[..., start : start + part.shape[-1]] += part * factor
    if spec.exact_rows:
        at = f["exact_at"].of(records).long()[..., None, :].expand(*weights.shape[:-1], spec.exact_rows)
        out += (weights.gather(-1, at) @ exact_tokens(records, layout)[1]).sum(2)
    return out
