"""The torch.library boundary of the paged store: kvarn::append_paged and kvarn::attend_paged (kvarn/paged.py).

Every address follows from table, starts and ends, which live on the device, and the sizes a launcher needs come as
plain integers: on a GPU (kvarn/paged_cuda.py) nothing waits for the device.
"""

import torch

from kvarn.paged import append_paged_cpu, attend_paged_cpu

lib = torch.library.Library("kvarn", "FRAGMENT")

lib.define("append_paged(Tensor k, Tensor v, Tensor(a!) cache, Tensor table, Tensor starts, Tensor ends, "
           "Tensor balance, str spec) -> ()", tags=(torch.Tag.pt2_compliant_tag,))
lib.define("attend_paged(Tensor q, Tensor k, Tensor v, Tensor cache, Tensor table, Tensor starts, Tensor ends, "
           "Tensor balance, SymInt max_count, SymInt max_end, float scale, str spec) -> Tensor",
           tags=(torch.Tag.pt2_compliant_tag,))


def _append_fake(k, v, cache, table, starts, ends, balance, spec):
    return None


def _attend_fake(q, k, v, cache, table, starts, ends, balance, max_count, max_end, scale, spec):
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _append_cuda(*args):
    from kvarn.paged_cuda import append_paged_cuda  # Triton is needed only where there is a GPU

    return append_paged_cuda(*args)


def _attend_cuda(*args):
    from kvarn.paged_cuda import attend_paged_cuda

    return attend_paged_cuda(*args)


lib.impl("append_paged", append_paged_cpu, "CPU")
lib.impl("attend_paged", attend_paged_cpu, "CPU")
lib.impl("append_paged", _append_cuda, "CUDA")
lib.impl("attend_paged", _attend_cuda, "CUDA")
torch.library.register_fake("kvarn::append_paged", _append_fake, lib=lib)
torch.library.register_fake("kvarn::attend_paged", _attend_fake, lib=lib)
