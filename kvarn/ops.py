"""The torch.library boundary: schema, fake and CPU implementation of every kvarn op.

Graphs, compile caches and other packages see only these. A GPU implementation adds a dispatch for "CUDA" and nothing
else. Store tensors (records, tail, lengths) are described in kvarn/layout.py; `spec` is QuantSpec.key, so a change of
format or preset changes the graph and every cache that hashes it.
"""

import torch
from torch import Tensor

from kvarn.append import append_cpu
from kvarn.attention import attend_cpu

lib = torch.library.Library("kvarn", "DEF")

TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.flexible_layout)
"""Arguments may have any strides: with fixed ones inductor makes each layer's call a mask and positions of its own."""

lib.define("sdpa(Tensor q, Tensor k, Tensor v, Tensor? mask, float dropout_p, bool is_causal, float? scale, "
           "bool enable_gqa) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
lib.define("append(Tensor k, Tensor v, Tensor positions, Tensor(a!) records, Tensor(b!) tail, Tensor(c!) lengths, "
           "Tensor balance, SymInt capacity, str spec) -> ()", tags=TAGS)
lib.define("attend(Tensor q, Tensor k, Tensor v, Tensor positions, Tensor records, Tensor tail, Tensor lengths, "
           "Tensor balance, Tensor? mask, SymInt kv_len, bool is_causal, float scale, str spec) -> Tensor", tags=TAGS)


def sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool,
         scale: float | None, enable_gqa: bool) -> Tensor:
    """F.scaled_dot_product_attention as one opaque node, so that a pass can find it after functionalization.

    q [B, Hq, n, D], k and v [B, H, S, D], mask broadcastable to [B, Hq, n, S]. It lives between capture and rewrite
    only: what the rewrite does not replace becomes the plain attention again.
    """
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, scale=scale,
                                                            enable_gqa=enable_gqa)


def _sdpa_fake(q, k, v, mask, dropout_p, is_causal, scale, enable_gqa):
    # Dynamo ties the length of one of them to the mask; without this the other would stay symbolic.
    torch._check(k.shape[-2] == v.shape[-2])
    return q.new_empty((*q.shape[:-1], v.shape[-1]))


def _append_fake(k, v, positions, records, tail, lengths, balance, capacity, spec):
    return None


def _attend_fake(q, k, v, positions, records, tail, lengths, balance, mask, kv_len, is_causal, scale, spec):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _append_cuda(*args):
    from kvarn.cuda import append_cuda  # Triton is needed only where there is a GPU

    return append_cuda(*args)


def _attend_cuda(*args):
    from kvarn.cuda import attend_cuda

    return attend_cuda(*args)


lib.impl("sdpa", sdpa, "CompositeExplicitAutograd")
lib.impl("append", append_cpu, "CPU")
lib.impl("attend", attend_cpu, "CPU")
lib.impl("append", _append_cuda, "CUDA")
lib.impl("attend", _attend_cuda, "CUDA")
torch.library.register_fake("kvarn::sdpa", _sdpa_fake, lib=lib)
torch.library.register_fake("kvarn::append", _append_fake, lib=lib)
torch.library.register_fake("kvarn::attend", _attend_fake, lib=lib)
