"""When RoPE and the cache write may become one op (graph_pass.py): what of an engine's configuration that needs.

The write must be in the graph, and in one piece with RoPE. So attention leaves it out (backend.KVarnApart), vLLM does
not cut its graph there, and RoPE stays one node. Where this cannot be had, nothing is changed and the log says why.
"""

from collections.abc import Iterator
from enum import Enum

import torch
from vllm.config import CompilationMode, CUDAGraphMode
from vllm.logger import init_logger

from kvarn.errors import KVarnError
from kvarn_compile.vllm.refusals import has_window
from kvarn_compile.vllm.settings import Settings

logger = init_logger("vllm.kvarn")

HOOK = "post_grad_custom_post_pass"
WRITE, ROPE = "vllm::unified_kv_cache_update", "rotary_embedding"


class Obstacle(Enum):
    """Why an engine's graphs are left alone."""

    NOT_COMPILED = "inductor does not compile the model (--enforce-eager, or another compilation mode or backend)"
    PIECEWISE = ("piecewise CUDA graphs are captured without a step's addresses; use --compilation-config "
                 "'{\"cudagraph_mode\": \"FULL_DECODE_ONLY\"}'")
    WINDOWS = "layers with a window keep vLLM's own cache, and their graphs are shared with the others'"
    DECOMPOSED = "custom_ops has -rotary_embedding, and only RoPE in one node is found"


def obstacles(config) -> Iterator[Obstacle]:
    """Of a VllmConfig."""
    compilation = config.compilation_config
    modes = (CompilationMode.DYNAMO_TRACE_ONCE, CompilationMode.VLLM_COMPILE)
    if compilation.mode not in modes or compilation.backend != "inductor":
        yield Obstacle.NOT_COMPILED
    if compilation.cudagraph_mode not in (None, CUDAGraphMode.NONE, CUDAGraphMode.FULL_DECODE_ONLY):
        yield Obstacle.PIECEWISE
    if has_window(config):
        yield Obstacle.WINDOWS
    if "-" + ROPE in compilation.custom_ops:
        yield Obstacle.DECOMPOSED


def prepare(config, settings: Settings) -> None:
    """Install the pass in a VllmConfig if it is asked for and can work; say so if it cannot."""
    found = list(obstacles(config)) if settings.fuse_rope else []
    for obstacle in found:
        logger.info("kvarn: fuse_rope has no effect: %s (%s).", obstacle.value, obstacle.name)
    if not settings.fuse_rope or found or installed(config):
        return
    from kvarn_compile.vllm.graph_pass import RopeStorePass

    compilation = config.compilation_config
    passes = compilation.inductor_compile_config
    passes[HOOK] = RopeStorePass(passes.get(HOOK))
    compilation.splitting_ops = [op for op in compilation.splitting_ops or () if op != WRITE]
    if "+" + ROPE not in compilation.custom_ops:
        compilation.custom_ops.append("+" + ROPE)


def installed(config) -> bool:
    """Whether the pass is in a VllmConfig."""
    from kvarn_compile.vllm.graph_pass import RopeStorePass

    return isinstance(config.compilation_config.inductor_compile_config.get(HOOK), RopeStorePass)


def write_apart(model) -> None:
    """Take the write out of the attention of a loaded model's layers in whose engine the pass is."""
    layers = [x for x in model.modules() if getattr(getattr(x, "impl", None), "may_write_apart", False)]
    if layers:
        from kvarn_compile.vllm.backend import KVarnApart  # not for engines that know nothing of kvarn

        for layer in layers:
            layer.attn_backend, layer.impl.writes_apart = KVarnApart, True


def refuse_capture(tensor: torch.Tensor) -> None:
    """Where a write finds no step: refuse a CUDA graph of it, whose replays would write nothing.

    Raises:
        KVarnError: while one is captured.
    """
    if tensor.is_cuda and torch.cuda.is_current_stream_capturing():
        raise KVarnError("fuse_rope: a CUDA graph is captured without attention metadata; use cudagraph_mode "
                         "FULL_DECODE_ONLY or set fuse_rope to false")
