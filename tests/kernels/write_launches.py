"""The kernels that write and unpack, as they are launched: what compiled.py compiles of them."""

import torch

from kvarn.kernels import append, configs, paged_append, paged_unpack, quantize, raw_pages, rope_append, unpack
from kvarn.layout import StoreLayout
from kvarn.paged_layout import PagedLayout
from kvarn.spec import PRESETS


def launches(dim: int, capability: int) -> dict:
    """name -> (kernel, constexprs, num_warps, num_stages, maxnreg, types that differ), as configs.py has them."""
    layout = StoreLayout(PRESETS["k4v2_g128"], dim, torch.bfloat16)
    pages = PagedLayout(layout.spec, dim, torch.bfloat16)
    offsets, paged = configs.offsets(layout), configs.offsets(pages) | {"PAGE": pages.page, "SPARE": pages.spare}
    raw = {"BLOCK": dim, **configs.raw_offsets(PagedLayout(PRESETS["k16v16"], dim, torch.bfloat16))}
    shape = dim, layout.spec.group, capability
    fill, leave = configs.fill(*shape), configs.leave(*shape)
    (block, warps), (paged_block, paged_warps) = configs.unpack(dim), configs.unpack_paged(dim)
    look = {"LOOK": configs.ROWS_PER_LOOK, "R": 16}
    turn = {"ROT": dim, "NEOX": True}
    asm = {"ASM": 1 + (capability >= 89)}

    def of(kernel, constants, num_warps, maxnreg=None):
        return kernel, {k: x for k, x in constants.items() if k in kernel.arg_names}, num_warps, 3, maxnreg, {}

    return {
        "fill": of(quantize.fill_tiles, offsets | asm, *fill),
        "token": of(quantize.leave_tiles, {**look, "ONE": True, **offsets}, leave),
        "leave": of(quantize.leave_tiles, {**look, "ONE": False, **offsets}, leave),
        "write": of(append.write_token, {"R": 16, **offsets}, 4),
        "unpack": of(unpack.unpack_tiles, {"R": block, **offsets}, warps),
        "pages": of(paged_append.append_pages, {**look, **paged}, leave),
        "blocks": of(paged_append.fill_blocks, paged | asm, *fill),
        "paged_unpack": of(paged_unpack.unpack_blocks, {"R": paged_block, **paged}, paged_warps),
        "rope_pages": of(rope_append.rope_append_pages, {**look, **paged, **turn}, leave),
        "rope_heads": of(rope_append.rope_heads, {"R": 16, "BLOCK": dim, **turn}, 4),
        "raw_close": of(raw_pages.close_raw, raw, 4),
        "raw_write": of(raw_pages.write_raw, raw, 4),
        "raw_read": of(raw_pages.read_raw, raw, 4),
    }
