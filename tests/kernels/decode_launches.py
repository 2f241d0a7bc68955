"""How the kernels of a decode are launched, for compiled.py."""

from dataclasses import replace

import torch

from kvarn.kernels import combine, configs, decode
from kvarn.paged_layout import PagedLayout
from kvarn.spec import PRESETS


def launches(dim: int, capability: int) -> dict:
    """name -> (kernel, constexprs, num_warps, num_stages, maxnreg, types that differ), as configs.py has them."""
    layout = PagedLayout(PRESETS["k4v2_g128"], dim, torch.bfloat16)
    combined = {"GROUP": 8, "PAGED": True, "SINKS": True, "MP": 8, "Q": dim // 4, "S": dim // 2}

    def combine_of(parts):
        block, warps = configs.combine(parts, dim)
        return combine.combine_parts, combined | {"BLOCK": block}, warps, 3, None, {}

    return {
        "decode": tiles(layout, 8, capability),
        "masked": tiles(layout, 8, capability, MASKED=True),
        "paged": tiles(layout, 8, capability, PAGED=True),
        "verify": tiles(layout, 16, capability, PAGED=True, ROWS=True),
        "softcap": tiles(layout, 8, capability, PAGED=True, SOFTCAP=True),
        "decode_exact": tiles(PagedLayout(replace(layout.spec, exact_rows=4), dim, torch.bfloat16), 8, capability),
        "combine": combine_of(99), "combine_some": combine_of(16), "combine_few": combine_of(4),
    }


def tiles(layout: PagedLayout, queries: int, capability: int, **flags: bool) -> tuple:
    """decode_tiles for `queries` query rows; flags that are not given are False."""
    config = configs.decode(32, 8, 128, queries, layout, 132)
    flags = dict.fromkeys(("PAGED", "MASKED", "ADDITIVE", "ROWS", "SOFTCAP"), False) | flags
    constants = {"blocks": 1, "GROUP": 8, "PAGE": layout.page, "SPARE": layout.spare, "MP": config.block,
                 "ASM": 1 + (capability >= 89), "OPEN": max(16, config.step // 4), "STEP": config.step,
                 "WARPS": config.num_warps, **flags, **configs.offsets(layout)}
    types = {"lengths": "*i32"} if flags["PAGED"] else {}
    return decode.decode_tiles, constants, config.num_warps, config.num_stages, config.maxnreg, types
