"""Who owns the content of a cache tensor: the tensor itself, or a packed store bound to it.

A store hangs on the user's K and V tensors as an attribute. So every compiled graph that meets these tensors (prefill,
decode, a recompiled one) finds the same store, and it dies with them; there is no registry.
"""

import logging
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from kvarn.cache import PackedCache
from kvarn.errors import OwnershipError
from kvarn_compile import storage
from kvarn_compile.walk import reachable
from kvarn_passes import CacheAxes, StorePair

log = logging.getLogger(__name__)
_ATTRIBUTE = "_kvarn_binding"


class Binding:
    """A packed store that holds the content of one K tensor and one V tensor.

    Attributes:
        store: the packed cache.
        axes: which dimension of the plain tensors is which.
    """

    def __init__(self, store: PackedCache, axes: CacheAxes, key: Tensor, value: Tensor):
        self.store, self.axes = store, axes
        self._tensors = weakref.ref(key), weakref.ref(value)

    def __reduce_ex__(self, protocol):
        raise OwnershipError("copying or pickling a packed KV cache: call kvarn_compile.release(cache) first")

    def tensors(self) -> tuple[Tensor | None, Tensor | None]:
        """The K and V tensors, None for one that is gone."""
        key, value = self._tensors
        return key(), value()

    def fits(self, pair: StorePair) -> bool:
        """True if a graph that was compiled for `pair` can use the store."""
        return self.store.spec == pair.spec and self.axes == pair.axes

    def plain(self) -> tuple[Tensor, Tensor]:
        """The content dequantized: K and V with the dimensions in the order of the plain tensors."""
        return tuple(x.permute(inverse(self.axes)) for x in self.store.unpack())  # type: ignore[return-value]

    def restore(self) -> None:
        """Moves the content back into the plain tensors and lets go of the store."""
        for tensor, content in zip(self.tensors(), self.plain(), strict=True):
            if tensor is not None:
                storage.refill(tensor, content)
                delattr(tensor, _ATTRIBUTE)


class NotOwned(Exception):
    """A cache cannot move to a store. The graph that asked must run on the plain tensors."""


def inverse(axes: CacheAxes) -> list[int]:
    """The permutation from [B, H, S, D] to the plain cache's order."""
    return [axes.order.index(dim) for dim in range(4)]


def binding_of(tensor: Tensor) -> Binding | None:
    """The store that owns this tensor's content, None if the tensor is plain."""
    return getattr(tensor, _ATTRIBUTE, None)


def acquire(pairs: Sequence[StorePair], args: Sequence[Tensor],
            balance: Callable[[int], Tensor | None]) -> list[PackedCache]:
    """The stores of a graph's K and V caches; a cache met for the first time is imported and its memory freed.

    Args:
        pairs: what the graph was compiled for.
        args: the graph's inputs before the rewrite; pairs number them.
        balance: gives the key scale [H, D] of a new store, by the pair's number, or None.

    Raises:
        NotOwned: if the memory of one of them cannot be freed, saying why. Then none is packed, except those that were
            before.
    """
    stores = [_bound(args[pair.key_input], args[pair.value_input], pair) for pair in pairs]
    new = [number for number, store in enumerate(stores) if store is None]
    for pair in (pairs[number] for number in new):
        for name, tensor in (("keys", args[pair.key_input]), ("values", args[pair.value_input])):
            _give_up(tensor, f"two graphs want it in different formats, now {pair.spec.key}")
            reason = storage.why_not_free(tensor)
            if reason:
                raise NotOwned(f"the {name} of {pair.module_path or 'a cache'} stay plain: {reason}")
    for number in new:
        pair = pairs[number]
        stores[number] = _pack(args[pair.key_input], args[pair.value_input], pair, balance(number))
    return stores  # type: ignore[return-value]


def _bound(key: Tensor, value: Tensor, pair: StorePair) -> PackedCache | None:
    """The store these two share already, if a graph compiled for `pair` can use it."""
    binding = binding_of(key)
    if binding is None or binding is not binding_of(value) or not binding.fits(pair):
        return None
    return binding.store


@torch.no_grad()
def _pack(key: Tensor, value: Tensor, pair: StorePair, balance: Tensor | None) -> PackedCache:
    filled = storage.has_memory(key) or storage.has_memory(value)
    if filled:
        for tensor in (key, value):
            storage.materialize(tensor)
    k, v = key.permute(pair.axes.order), value.permute(pair.axes.order)
    rows, heads, capacity, dim = k.shape
    with torch.inference_mode(False):  # the store outlives the caller's mode, and a graph may write it in another
        store = PackedCache.empty(pair.spec, rows, heads, capacity, dim, key.dtype, key.device, balance)
        if filled:
            store.load(k, v)
    log.debug("packed %s: %d -> %d bytes", pair.module_path, key.nbytes + value.nbytes, store.nbytes)
    binding = Binding(store, pair.axes, key, value)
    for tensor in (key, value):
        storage.free(tensor)
        setattr(tensor, _ATTRIBUTE, binding)
    return store


def restore_plain(tensors: Iterable[Tensor]) -> None:
    """Makes `tensors` plain, those whose content is in a store with a warning: the caller reads or writes them plain.

    Raises:
        OwnershipError: for a view taken of a packed tensor: it has the memory that was given back.
    """
    for tensor in tensors:
        if tensor._base is not None and binding_of(tensor._base) is not None:
            raise OwnershipError(f"a view {tuple(tensor.shape)} of a packed KV cache is read: call "
                                 "kvarn_compile.release(cache) before taking views of it")
        why = "a graph reads or writes it in plain form (kvarn_compile.explain says why)"
        _give_up(tensor, why)
        if storage.materialize(tensor):
            log.warning("allocating a KV cache of %s: %s", tuple(tensor.shape), why)


def _give_up(tensor: Tensor, why: str) -> None:
    binding = binding_of(tensor)
    if binding is not None:
        log.warning("unpacking a KV cache of %s: %s", tuple(tensor.shape), why)
        binding.restore()


def release(cache: Any) -> int:
    """Moves packed caches back into the user's plain tensors, dequantized; one that never had memory becomes zeros.

    Doing it twice changes nothing.

    Args:
        cache: a tensor, a module, a transformers Cache, or any object or container that holds such.

    Returns:
        How many K and V pairs were unpacked.

    Raises:
        OwnershipError: if there is no tensor in `cache`.
    """
    tensors = [tensor for tensor in reachable(cache) if isinstance(tensor, Tensor)]
    if not tensors:
        raise OwnershipError(f"release({type(cache).__name__}): no tensor found in it; valid: a tensor, a module, a "
                             "transformers Cache, or an object or container of these")
    released = 0
    for tensor in tensors:
        binding = binding_of(tensor)
        if binding is not None:
            binding.restore()
            released += 1
        else:
            storage.materialize(tensor)
    return released
