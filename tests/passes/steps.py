"""What tests run: chunks of tokens through toy models, and single attentions written out in the test itself."""

import torch
import torch.nn.functional as F
from compare import LOSSLESS, TOLERANCE, Calls, RewritingBackend, run_both
from torch import nn
from torch._dynamo.utils import counters
from toy_models import Config, StaticLayer

CHUNKS = (5, 1, 1, 130, 1)
"""A prompt, decode steps, a chunk that crosses a tile's edge, and a step after it."""


def positions_of(style: str, start: int, n: int, batch: int):
    if style == "llama":
        return start
    positions = torch.arange(start, start + n)
    return positions + 3 * torch.arange(batch)[:, None] if style == "rows" else positions


def in_chunks(style: str, chunks=CHUNKS, batch: int = 1, kind=StaticLayer, vocab: int = 97) -> Calls:
    """style: "hf" (the cache is made anew for each run), "gpt", "rows" (one position per row) or "llama"."""

    def calls(model):
        torch.manual_seed(1)
        config = model.config
        cache = [kind(config) for _ in range(1 if getattr(model, "share", False) else config.layers)]
        outputs, start = [], 0
        for n in chunks:
            ids = torch.randint(0, vocab, (batch, n))
            outputs.append(model(ids, cache if style == "hf" else positions_of(style, start, n, batch)))
            start += n
        return outputs

    return calls


class Cached(nn.Module):
    """One attention over one cache; `step` is the test's own way to write and attend."""

    def __init__(self, step, config=None, dtype=torch.float32):
        super().__init__()
        self.config = config or Config(heads=2, kv_heads=2, capacity=64, dtype=dtype)
        self.step = step
        self.register_buffer("k_cache", self.config.cache())
        self.register_buffer("v_cache", self.config.cache())

    def forward(self, x, position):
        return self.step(self, x, position)


def drive(step, config=None, dtype=torch.float32, spec=LOSSLESS, n=1):
    """Runs `step` plain and rewritten on three chunks; returns the backend, having compared the outputs."""
    backend = RewritingBackend(spec)
    model = Cached(step, config, dtype)

    def calls(f):
        torch.manual_seed(2)
        x = [torch.randn(1, 2, n, model.config.head_dim, dtype=dtype) for _ in range(3)]
        outputs = [f(x[i], torch.arange(p, p + n)) for i, p in enumerate((0, 3, 7))]
        return [output[0] if isinstance(output, tuple) else output for output in outputs]

    difference = run_both(model, calls, backend)
    assert difference < TOLERANCE[dtype]
    return backend


def attend(m, q, k, v, **options):
    mask = torch.zeros(1, 1, q.shape[2], k.shape[2], dtype=q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, **options)


def write(m, x, position):
    m.k_cache[:, :, position] = x
    m.v_cache[:, :, position] = 2 * x


def plain(m, x, position):
    write(m, x, position)
    return attend(m, x, m.k_cache, m.v_cache)


def reasons(backend) -> set:
    return {decision.refusal.reason if decision.refusal else None for decision in backend.decisions}


def check_refused(backend, reason):
    """All attentions refused for this reason, explained, and left as plain attention."""
    assert reasons(backend) == {reason}
    refusal = backend.decisions[0].refusal
    assert refusal.message and refusal.hint
    assert all(result.pairs == () for result in backend.results)
    assert backend.ops(torch.ops.kvarn.sdpa.default) == backend.ops(torch.ops.kvarn.attend.default) == 0
    found = len(backend.decisions)
    assert counters["kvarn"] == {"attention_found": found, "attention_rewritten": 0, "attention_refused": found}
    return refusal
