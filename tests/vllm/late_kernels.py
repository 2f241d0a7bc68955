"""Which kernels random steps compile after the warm-up, for a GPU that need not be here.

Nothing is compiled or launched: Triton's own keys say what would be. Run by test_warm_up.py; prints, as JSON, {layout:
{"warm": kernels, "late": kernels, "other": kernels of a step that the engine never has}}.

    python late_kernels.py MODEL
"""

import json
import random
import sys
from types import SimpleNamespace

import torch
from serving import configure
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction
from vllm.config import set_current_vllm_config
from vllm.v1.attention.backend import CommonAttentionMetadata

import kvarn.paged_ops
from kvarn import decode_cuda, paged_cuda
from kvarn_compile.vllm import warmup
from kvarn_compile.vllm.impl import KVarnImpl
from kvarn_compile.vllm.metadata import TileMetadataBuilder
from kvarn_compile.vllm.prompts import Flash

HEADS, KV_HEADS = 8, 2
LAYOUTS = (("k4v2_g128", 64), ("k4v4_g128", 128), ("k8v8_g128", 256), ("k16v16", 128))


class Hopper:
    """A Triton driver for sm_90 that launches nothing."""

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)


def watch():
    """The names of kernels that would be compiled from now on."""
    seen = []

    def compile_nothing(self, key, signature, device, *args):
        seen.append(self.__name__)
        kernel = SimpleNamespace(function=0, packed_metadata=(), launch_metadata=lambda *args: None,
                                 run=lambda *args: None)
        self.device_caches[device][0][key] = kernel
        return kernel

    JITFunction._do_compile = compile_nothing
    return seen


def pretend():
    """Tensors in the host's memory take a GPU's way."""
    driver.set_active(Hopper())
    for module in (decode_cuda, paged_cuda):
        module.processors, module.capability = (lambda device: 132), (lambda device: 90)
        module.assembly = lambda device: 2
    library = torch.library.Library("kvarn", "IMPL")
    for name in ("append_paged", "attend_paged"):
        library.impl(name, getattr(kvarn.paged_ops, f"_{name.split('_')[0]}_cuda"), "CPU", allow_override=True)
    return library


def metadata(counts, lengths, width):
    starts, ends = torch.tensor([0, *counts]).cumsum(0).int(), torch.tensor(lengths).int()
    return CommonAttentionMetadata(
        query_start_loc=starts, query_start_loc_cpu=starts, seq_lens=ends, seq_lens_cpu_upper_bound=ends,
        num_reqs=len(counts), num_actual_tokens=int(starts[-1]), max_query_len=max(counts), max_seq_len=max(lengths),
        slot_mapping=starts, block_table_tensor=torch.zeros(len(counts), width, dtype=torch.int32))


def steps(config, count, numbers):
    """Rows with one new token, then prompts with and without history, within the engine's limits."""
    most, rows = config.scheduler_config.max_num_batched_tokens, config.scheduler_config.max_num_seqs
    for _ in range(count):
        decodes, prompts = numbers.randint(0, rows // 2), numbers.randint(1, rows // 2)
        counts = [1] * decodes + [numbers.randint(2, (most - decodes) // prompts) for _ in range(prompts)]
        room = config.model_config.max_model_len
        yield counts, [n + (numbers.randint(1, room - n) if n == 1 or numbers.random() < 0.5 else 0) for n in counts]


def look(seen, model, preset, dim):
    config = configure(model, kv_cache_dtype=f"kvarn_{preset}", dtype="bfloat16", max_num_seqs=12, max_model_len=1024,
                       max_num_batched_tokens=1024)
    with set_current_vllm_config(config):
        impl = KVarnImpl(HEADS, dim, dim**-0.5, KV_HEADS)
    layout, width = impl.layout, impl.layout.blocks(1024)
    impl.flash = Flash(lambda **arguments: None, 3, paged_cuda.unpack_paged, impl.scale)
    impl.decode = decode_cuda.decode_paged if layout.spec.rotated else None
    impl.balance = torch.ones(KV_HEADS, dim)
    layer = SimpleNamespace(num_heads=HEADS, num_kv_heads=KV_HEADS, layer_name="layer")
    config.compilation_config.static_forward_context["layer"] = layer
    builder = TileMetadataBuilder(SimpleNamespace(), ["layer"], config, torch.device("cpu"))
    cache = torch.zeros(2, KV_HEADS, 1, layout.record_bytes, dtype=torch.uint8)

    def run(counts, lengths, padding=0):
        qkv = torch.zeros(sum(counts) + padding, HEADS + 2 * KV_HEADS, dim, dtype=torch.bfloat16)
        q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), 1)
        step = builder.build(0, metadata(counts, lengths, width))
        impl.forward(layer, q, k, v, cache, step, torch.empty(q.shape, dtype=q.dtype))

    def names_of(what):
        seen.clear()
        what()
        return sorted(seen)

    def serve():
        numbers = random.Random(0)
        for counts, lengths in steps(config, 40, numbers):
            run(counts, lengths, numbers.randint(0, 8))

    def draft():
        builder.reorder_batch_threshold = 3
        run([3, 3], [50, 60])

    warm = names_of(lambda: warmup.compile_kernels(config.instance_id, impl.shape, impl.flash, torch.device("cpu")))
    return {"warm": warm, "late": names_of(serve), "other": names_of(draft)}


def main():
    library, seen = pretend(), watch()
    print(json.dumps({f"{preset} {dim}": look(seen, sys.argv[1], preset, dim) for preset, dim in LAYOUTS}))
    del library


if __name__ == "__main__":
    main()
