"""`kvarn generate` and `kvarn explain`: one model, its own prompt, a packed cache."""

import torch
from rich.console import Console

from kvarn_compile import hf, progress
from kvarn_compile.decode import greedy, stream, warm_up, writer
from kvarn_compile.hf_models import CACHE_ARGUMENT, LoadedModel, cache_bytes, cache_tensors, open_model, stepper
from kvarn_compile.report import Explanation, explain

PROMPT_IDS, CAPACITY = 8, 1024
"""Tokens of the made-up prompt, and positions of the cache, that `kvarn explain` traces a model with."""


def run(name: str, prompt: str, preset: str, new_tokens: int, inner: str, say: Console) -> None:
    """Print what the model answers to `prompt`, and how large its packed cache is.

    Raises:
        ModelError, SpecError: for a model or preset that does not exist.
    """
    loaded = open_model(name)
    ids = loaded.prompt_ids(prompt)
    positions = ids.shape[1] + new_tokens
    cache = hf.empty_static_cache(loaded.model.config, 1, positions, loaded.model.dtype)
    model = torch.compile(loaded.model, backend="kvarn", options={"preset": preset, "inner": inner})
    step = stepper(model, cache, logits_to_keep=1)
    with progress.bar(f"compiling with {inner}"):
        warm_up(step, ids)
    cache.reset()
    text = stream(greedy(step, ids, new_tokens, loaded.stop), loaded.tokenizer, writer(say))
    say.print(f"\n\n{len(text.tokens)} tokens, {text.tokens_per_second:.1f} per second; "
              f"the cache of {positions:,} positions takes {cache_bytes(cache):,} bytes, "
              f"plain it would take {sum(t.nbytes for t in cache_tensors(cache)):,}")


def explain_model(name: str, preset: str) -> Explanation:
    """What backend="kvarn" does with a causal LM and a StaticCache.

    Raises:
        ModelError, SpecError: as run.
    """
    return explain_loaded(open_model(name), preset)


def explain_loaded(loaded: LoadedModel, preset: str) -> Explanation:
    """The explanation of a prompt call."""
    cache = hf.empty_static_cache(loaded.model.config, 1, CAPACITY, loaded.model.dtype)
    ids = torch.zeros(1, PROMPT_IDS, dtype=torch.int64)
    with torch.no_grad(), progress.bar("tracing"):
        return explain(loaded.model, input_ids=ids, preset=preset, **{CACHE_ARGUMENT: cache})
