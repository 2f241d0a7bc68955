"""The device on which launchers launch: their first tensor's, which need not be the current one."""

import pytest
import torch

from kvarn import cuda, device, paged_cuda


class Elsewhere:
    """What a guard asks of a tensor on the second GPU; a launcher fails on it."""

    is_cuda = True

    @staticmethod
    def get_device():
        return 1


@pytest.fixture
def visited(monkeypatch):
    """The devices that were made current, one after the other, on a machine whose first GPU is at first."""
    seen = [0]

    def exchange(index):
        seen.append(index)
        return seen[-2]

    monkeypatch.setattr(torch.cuda, "_exchange_device", exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", exchange)
    return seen


@pytest.mark.parametrize("launcher, arguments", [(cuda.append_cuda, 9), (cuda.attend_cuda, 13),
                                                 (paged_cuda.append_paged_cuda, 8), (paged_cuda.attend_paged_cuda, 12)])
def test_launchers_run_on_their_tensors_device(visited, launcher, arguments):
    with pytest.raises(AttributeError):
        launcher(Elsewhere, *[None] * (arguments - 1))
    assert visited == [0, 1, 0]


def test_the_device_is_current_inside(visited):
    inside = device.on_own_device(lambda tensor: visited[-1])
    assert inside(Elsewhere) == 1
    assert inside(torch.zeros(1)) == -1  # PyTorch's word for "as it is"
