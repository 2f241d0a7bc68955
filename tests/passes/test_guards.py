"""What a store can hold, one cache tensor at a time."""

import pytest
import torch
from torch import fx, nn

from kvarn.spec import PRESETS
from kvarn_passes import CacheAxes, Reason
from kvarn_passes.guards import check_cache
from kvarn_passes.refusal import Refused

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


class Owner(nn.Module):
    """A cache that is the module's parameter and one that is its buffer."""

    def __init__(self):
        super().__init__()
        self.parameter = nn.Parameter(torch.zeros(1, 2, 8, 64), requires_grad=False)
        self.register_buffer("buffer", torch.zeros(1, 2, 8, 64))

    def forward(self, x):
        return x + self.parameter + self.buffer


def test_parameter():
    """Told by the source Dynamo notes on the placeholder, which kvarn_compile copies to the ATen graph."""
    sources = {}

    def backend(gm, inputs):
        sources.update({node.name: node._dynamo_source for node in gm.graph.find_nodes(op="placeholder")})
        return gm.forward

    torch.compile(Owner(), backend=backend, fullgraph=True)(torch.zeros(1))
    for name, source in sources.items():
        node = cache_node()
        node._dynamo_source = source
        if "parameters_parameter" not in name:
            check_cache(node, AXES, PRESETS["k4v2_g128"])
            continue
        with pytest.raises(Refused) as refused:
            check_cache(node, AXES, PRESETS["k4v2_g128"])
        assert refused.value.refusal.reason is Reason.PARAMETER
    assert sorted("parameters_parameter" in name for name in sources) == [False, False, True]


def test_lossless_holds_any_head_dim():
    check_cache(cache_node(head_dim=80), AXES, PRESETS["k16v16"])
