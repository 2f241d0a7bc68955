"""How the kernels of a chunk under a mask are launched, for compiled.py."""

from kvarn.kernels import blocks, configs, extent, prefill

TYPES = {"key": "*bf16", "value": "*bf16", "order": "*i32", "counts": "*i32", "sights": "*i8"}


def launches(dim: int, capability: int) -> dict:
    """name -> (kernel, constexprs, num_warps, num_stages, maxnreg, types that differ), as configs.py has them."""
    config = configs.prefill(dim, capability)
    chunk = {"D": dim, "M": config.queries, "N": config.keys, "P": config.part, "TURNS": config.turns,
             "m_s": 1}
    lists = {"M": config.queries, "C": 32}
    options = config.num_warps, config.num_stages, None
    return {
        "chunk": (prefill.attend_chunk, {**chunk, "ADDITIVE": False}, *options, TYPES),
        "chunk_turns": (prefill.attend_chunk, {**chunk, "ADDITIVE": False, "TURNS": True}, *options, TYPES),
        "chunk_bias": (prefill.attend_chunk, {**chunk, "ADDITIVE": True}, *options, {**TYPES, "mask": "*bf16"}),
        **{f"sights{size}": (blocks.find_sights, {"ADDITIVE": size > 1, "N": config.keys, "R": 16 // size,
                                                  "C": 1024 // config.keys, "m_s": 1}, 4, 3, None,
                             {**TYPES, "mask": kind}) for size, kind in KINDS.items()},
        **{f"extent{size}": (extent.find_extent, {"ADDITIVE": size > 1, "ROWS": 8, "BLOCK": extent.AT_ONCE // size // 8,
                                                  "STAGES": extent.STAGES, "m_s": 1}, 16, 3, None, {"mask": kind})
           for size, kind in KINDS.items()},
        "lists": (blocks.list_blocks, lists, 8, 3, None, TYPES),
    }


KINDS = {1: "*u8", 2: "*bf16", 4: "*fp32"}
"""Types of a mask's entries by their size."""
