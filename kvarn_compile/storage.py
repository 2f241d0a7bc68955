"""Memory of plain cache tensors: giving it back, and tensors that never had any.

A freed tensor keeps its shape, strides and storage size. On the CPU the pages go back to the system: reading gives
zeros (it must not crash the process) and writing raises, so nothing is lost silently. On CUDA the storage is exchanged
for one without memory, of the same size, on which any access raises.
"""

import ctypes
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

_MADV_DONTNEED = 4
_FREED = "this KV cache lives in a packed kvarn store; call kvarn_compile.release(cache) to get the plain tensor back"
_EMPTY = ("this KV cache has no memory yet: run a model compiled with backend='kvarn' on it, or call "
          "kvarn_compile.release(cache) to make it a plain tensor of zeros")


def empty_cache(shape: Sequence[int], dtype: torch.dtype = torch.float16, device: torch.device | str = "cpu") -> Tensor:
    """A cache tensor of zeros that takes no memory until something is written to it in plain form.

    With it a model can start without ever holding its plain cache: the compiled model moves it to a packed store at
    the first call. Where the model turns out to be unsupported it works as an ordinary tensor of zeros (CPU).

    Args:
        shape: sizes of the cache, e.g. (batch, KV heads, capacity, head_dim).
        dtype: its dtype.
        device: "cpu", or a CUDA device: there the tensor has no memory at all until a compiled model takes it, and any
            access before that raises.
    """
    device, nbytes = torch.device(device), math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return torch.zeros(tuple(shape), dtype=dtype, device=device)
    if device.type == "cpu":
        # Private: pages of a shared mapping would outlive madvise, and a forked child would write into them.
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        storage = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
        husk = torch.empty(0, dtype=dtype).set_(storage, 0, tuple(shape))  # type: ignore[call-overload]
    else:
        husk = _without_memory(torch.empty(shape, dtype=dtype, device="meta"), device, _EMPTY)
    husk._kvarn_husk = True  # type: ignore[attr-defined]
    return husk


def has_memory(tensor: Tensor) -> bool:
    """False for a CUDA tensor of `empty_cache`, or a freed one: there is nothing to read."""
    return tensor.device.type == "cpu" or not hasattr(tensor, "_kvarn_husk")


def why_not_free(tensor: Tensor) -> str:
    """Why the memory of `tensor` cannot be given back, in words; "" if it can."""
    if isinstance(tensor, torch.nn.Parameter):
        return "it is a parameter, not a buffer"
    storage = tensor.untyped_storage()
    if storage.nbytes() != tensor.numel() * tensor.element_size():
        return "it is a part of a larger tensor"
    # One owner is the tensor, the other is the Python object `storage`.
    if torch._C._storage_Use_Count(storage._cdata) > 2:
        return "another tensor shares its memory"
    if tensor.device.type == "cpu":
        if storage.is_shared() or storage.filename is not None:
            return "its memory is shared with another process or a file"
        if tensor.is_pinned():
            return "its memory is pinned"
    elif tensor.device.type != "cuda":
        return f"its memory is on {tensor.device.type}; valid: cpu, cuda"
    if not storage.resizable() and not hasattr(tensor, "_kvarn_husk"):
        return "its memory belongs to another library (numpy, a buffer) or to a CUDA graph"
    return ""


def free(tensor: Tensor) -> None:
    """Gives the memory of a tensor back, for which why_not_free returned "". It keeps its shape and strides."""
    if tensor.device.type == "cpu":
        _return_pages(tensor.data_ptr(), tensor.untyped_storage().nbytes())
        torch._C._set_throw_on_mutable_data_ptr(tensor)
    else:
        with torch.inference_mode(tensor.is_inference()), torch.no_grad():
            tensor.data = _without_memory(tensor, tensor.device, _FREED)
        tensor._kvarn_husk = True  # type: ignore[attr-defined]


def materialize(tensor: Tensor) -> bool:
    """Gives a tensor that has no memory zeros to hold, so that it can be used in plain form; False if it has memory."""
    if has_memory(tensor):
        return False
    refill(tensor, torch.zeros((), dtype=tensor.dtype, device=tensor.device).expand(tensor.shape))
    return True


def refill(tensor: Tensor, content: Tensor) -> None:
    """Gives a freed tensor memory again, with `content` (of its shape) in it; the Python object stays the same."""
    # A freed CPU storage cannot be made writable again, so it is replaced, under the tensor's own strides.
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        fresh = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        tensor.data = fresh.copy_(content)
    if hasattr(tensor, "_kvarn_husk"):
        delattr(tensor, "_kvarn_husk")


def _without_memory(like: Tensor, device: torch.device, why: str) -> Tensor:
    """A tensor of the shape, strides, dtype and storage size of `like`, whose data pointer raises `why`."""
    husk = torch.empty(0, dtype=like.dtype, device=device)
    storage = torch._C._construct_storage_from_data_pointer(0, husk.device, like.untyped_storage().nbytes())
    husk.set_(storage, 0, like.shape, like.stride())  # type: ignore[call-overload]
    # From here on: set_ itself asks for the pointer. Only CUDA builds of torch have this function.
    torch._C._set_storage_data_ptr_access_error_msg(storage._cdata, why)
    return husk


def _return_pages(address: int, nbytes: int) -> None:
    """Zeroes `nbytes` bytes at `address`, by dropping the whole pages among them."""
    page = mmap.PAGESIZE
    first, last = -(-address // page) * page, (address + nbytes) // page * page
    if last <= first:
        ctypes.memset(address, 0, nbytes)
        return
    ctypes.memset(address, 0, first - address)
    ctypes.memset(last, 0, address + nbytes - last)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), _MADV_DONTNEED) != 0:
        ctypes.memset(first, 0, last - first)  # still zeros to a reader, though the memory stays
