"""What inductor makes of a decode step: which inputs CUDA graphs may leave where they are, and what is copied."""

import re

import pytest
import torch
from test_hf import CACHE, tiny, tokens
from torch._inductor import compile_fx, config
from torch._inductor.utils import run_and_get_code

from kvarn_compile import hf
from kvarn_compile.binding import binding_of

LAYERS = 2


@pytest.fixture(scope="module")
def step():
    """(inputs a call writes, inputs that stay at their address, all inputs; the generated code; the cache)."""
    seen, plain = [], compile_fx.get_static_input_idxs

    def spy(fixed):
        metadata = torch._guards.TracingContext.get().fw_metadata
        written = {i for i, info in enumerate(metadata.input_info) if info.mutates_data}
        seen.append((written, set(plain(fixed)), len(metadata.input_info)))
        return plain(fixed)

    model = tiny()
    cache = hf.empty_static_cache(model.config, 1, 320, torch.float32)
    with pytest.MonkeyPatch.context() as patch, config.patch(force_disable_caches=True), torch.no_grad():
        patch.setattr(compile_fx, "get_static_input_idxs", spy)
        call = torch.compile(model, backend="kvarn", options={"preset": "k16v16"})
        _, code = run_and_get_code(call, tokens(1, 1), **{CACHE: cache})
    return *seen[-1], code[-1], cache


def test_every_written_input_is_static(step):
    written, static, inputs, _, _ = step
    assert len(written) == LAYERS * len(("records", "tail", "lengths", "cumulative_length"))
    assert written <= static
    assert inputs - len(static) == 1  # the token ids: CUDA graphs copy these


def test_stores_are_written_where_they_are(step):
    *_, code, cache = step
    records = binding_of(cache.layers[0].keys).store.records
    appends = re.findall(r"kvarn\.append\.default\((.*)\)", code)
    assert len(appends) == LAYERS
    assert all(len(re.findall(r"\barg\d+_1\b", call)) >= 4 for call in appends)  # records, tail, lengths, balance
    assert re.sub(r"\s", "", str(tuple(records.shape))) in re.sub(r"\s", "", code)
    assert not re.search(rf"empty_strided\w*\(\({', '.join(map(str, records.shape))}\)", code)


def test_layers_share_one_mask(step):
    *_, code, _ = step
    assert len(re.findall(r"= empty_strided\w*\(\(1, 1, 1, 320\)", code)) == 1
