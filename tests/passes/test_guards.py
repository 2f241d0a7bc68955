"""What a store can hold, one cache tensor at a time."""

import pytest
import torch
from kvarn_passes import CacheAxes, Reason
from kvarn_passes.guards import check_cache
from kvarn_passes.refusal import Refused
from torch import fx

from kvarn.spec import PRESETS

AXES = CacheAxes(0, 1, 2, 3)


def cache_node(**options) -> fx.Node:
    node = fx.Graph().placeholder("cache")
    node.meta["val"] = torch.empty(1, 2, 8, options.pop("head_dim", 64), **options)
    return node


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_float_caches_pass(dtype):
    check_cache(cache_node(dtype=dtype), AXES, PRESETS["k4v2_g128"])


@pytest.mark.parametrize("options, reason", [
    ({"dtype": torch.float64}, Reason.DTYPE), ({"dtype": torch.int8}, Reason.DTYPE),
    ({"device": "meta"}, Reason.DEVICE), ({"requires_grad": True}, Reason.GRAD), ({"head_dim": 80}, Reason.HEAD_DIM)])
def test_refused(options, reason):
    with pytest.raises(Refused) as refused:
        check_cache(cache_node(**options), AXES, PRESETS["k4v2_g128"])
    assert refused.value.refusal.reason is reason and refused.value.refusal.node == "cache"


def test_lossless_holds_any_head_dim():
    check_cache(cache_node(head_dim=80), AXES, PRESETS["k16v16"])
