"""What every pass shares."""

import logging

import torch
from torch import fx

from kvarn.spec import PRESETS
from kvarn_passes import uuid
from kvarn_passes.base import Pass


class Negate(Pass[int]):
    name = "negate"

    def run(self, gm):
        output = gm.graph.find_nodes(op="output")[0]
        with gm.graph.inserting_before(output):
            output.args = (gm.graph.call_function(torch.neg, output.args),)
        gm.recompile()
        return 1


def test_logs_time_and_both_graphs(caplog):
    gm = fx.symbolic_trace(lambda x: x + 1)
    with caplog.at_level(logging.DEBUG, logger="kvarn_passes"):
        assert Negate()(gm) == 1
    before, time, after = [record.getMessage() for record in caplog.records if record.name == "kvarn_passes"]
    assert "negate_before" in before and "torch.neg" not in before
    assert "negate took" in time and "negate_after" in after and "torch.neg" in after


def test_uuid_depends_on_the_spec_and_nothing_else():
    ids = {uuid(spec) for spec in PRESETS.values()}
    assert len(ids) == len(PRESETS)
    assert uuid(PRESETS["k16v16"]) == uuid.__wrapped__(PRESETS["k16v16"])
