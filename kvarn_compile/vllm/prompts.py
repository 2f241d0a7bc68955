"""Attention of prompt tokens by vLLM's own FlashAttention: over the step's keys and values, or over unpacked ones."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version, is_flash_attn_varlen_func_available

from kvarn_compile.vllm.metadata import Prompts


@dataclass(frozen=True)
class Flash:
    """FlashAttention over sequences laid end to end.

    Attributes:
        run: flash_attn_varlen_func, of FlashAttention's `version`.
        unpack: kvarn.paged_cuda.unpack_paged: keys and values of packed rows, laid so.
        scale: of the scores.
    """

    run: Callable[..., Any]
    version: int
    unpack: Callable[..., tuple[Tensor, Tensor]]
    scale: float

    @staticmethod
    def of(head_size: int, dtype: torch.dtype, scale: float) -> "Flash | None":
        """What the platform has for this head size and dtype; None where attend_paged has to do it."""
        if dtype == torch.float32 or not is_flash_attn_varlen_func_available():
            return None
        version = get_flash_attn_version(head_size=head_size)
        if version is None:
            return None
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        from kvarn.paged_cuda import unpack_paged

        return Flash(flash_attn_varlen_func, version, unpack_paged, scale)

    def attend(self, rows: Prompts, q: Tensor, k: Tensor, v: Tensor, cache: Tensor, balance: Tensor, spec: str,
               out: Tensor) -> None:
        """Attention of the rows' new q into out, after the append of their k, v: these unrounded.

        q, out [n, Hq, D] and k, v [n, H, D] are the step's: FlashAttention, too, finds a row by where it starts.
        """
        if rows.key_starts is not None:
            k, v = self.unpack(k, v, cache, rows.table, rows.starts, rows.ends, rows.key_starts, balance, rows.keys,
                               rows.max_end, spec)
        self.run(q=q, k=k, v=v, out=out, cu_seqlens_q=rows.starts,
                 cu_seqlens_k=rows.starts if rows.key_starts is None else rows.key_starts, max_seqlen_q=rows.max_count,
                 max_seqlen_k=rows.max_end, softmax_scale=self.scale, causal=True, fa_version=self.version)
