"""model.generate() of torch.compile(model, backend="kvarn"), and telling whether kvarn compiled a model.

torch.compile returns an OptimizedModule, which hands every attribute but forward on to the module it wraps. So
generate(), a method of that module, would call it uncompiled, without a word. Importing this module (the backend does,
and torch.compile imports the backend) gives OptimizedModule a `generate` that runs the compiled model instead, if the
backend is kvarn; nothing changes for other backends.
"""

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch._dynamo.eval_frame import OptimizedModule, innermost_backend

_switching = threading.Lock()


def adapt_transformers() -> None:
    """Teaches transformers' caches and generate() about stores, if transformers is in the process."""
    if "transformers" in sys.modules:
        from kvarn_compile import hf

        hf.install()


def compiled_by_kvarn(compiled: Any) -> bool:
    """True for a function or module that torch.compile(..., backend="kvarn") returned."""
    from kvarn_compile.backend import kvarn

    context = getattr(compiled, "dynamo_ctx", None)
    if context is None and hasattr(compiled, "get_compiler_config"):
        # A compiled function holds its context only in the closure of this method.
        context = inspect.getclosurevars(compiled.get_compiler_config).nonlocals.get("self")
    callback = getattr(context, "callback", None)
    return callable(callback) and getattr(innermost_backend(callback), "compiler_fn", None) is kvarn


def _generate(optimized: OptimizedModule) -> Callable[..., Any]:
    model = optimized._orig_mod
    generate: Any = model.generate  # AttributeError for a module without one, as before
    if not compiled_by_kvarn(optimized):
        return generate
    adapt_transformers()

    @functools.wraps(generate)
    def compiled_generate(*args, **kwargs):
        with _compiled(model, optimized):
            return generate(*args, **kwargs)

    return compiled_generate


@contextmanager
def _compiled(model: nn.Module, optimized: OptimizedModule) -> Iterator[None]:
    """Inside, calling `model` runs its compiled form, as it does after model.compile(). May overlap with others."""
    with _switching:
        depth, before = vars(model).get("_kvarn_generating", (0, model._compiled_call_impl))
        vars(model)["_kvarn_generating"] = depth + 1, before
        if depth == 0:
            model._compiled_call_impl = optimized.dynamo_ctx(model._call_impl)
    try:
        yield
    finally:
        with _switching:
            depth, before = vars(model).pop("_kvarn_generating")
            if depth == 1:
                model._compiled_call_impl = before
            else:
                vars(model)["_kvarn_generating"] = depth - 1, before


OptimizedModule.generate = property(_generate)  # type: ignore[attr-defined]
