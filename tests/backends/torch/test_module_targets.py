"""Which layers of a module are adapted where the user names none, or its last blocks."""

import pytest
from torch import nn

from thimble.backends.torch.module_targets import usual_targets
from thimble.errors import InputError


def block():
    return nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.ReLU(), nn.Dropout())


class Encoder(nn.Module):
    """A list of blocks with a short list of long blocks beside it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(*(nn.ReLU() for _ in range(9)), nn.Linear(4, 4))
        self.blocks = nn.ModuleList(nn.ModuleDict({"q": nn.Linear(4, 4), "v": nn.Linear(4, 4)}) for _ in range(3))
        self.head = nn.Linear(4, 2)


def test_the_last_blocks_of_a_network_that_is_itself_the_list():
    network = nn.Sequential(block(), block(), block(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    found, why = usual_targets(network, ["last-2"], ["5"])
    assert found == ["1.0", "1.3", "2.0", "2.3"]
    assert why == "targets: all-pointwise in the last 2 of 3 blocks of the module"
    with pytest.raises(InputError, match="--targets last-4: the module has 3 blocks with layers to adapt"):
        usual_targets(network, ["last-4"], ["5"])


def test_the_last_blocks_are_those_of_the_list_with_most_to_adapt():
    assert usual_targets(Encoder(), ["last-1"], ["head"])[0] == ["blocks.2.q", "blocks.2.v"]
    assert usual_targets(Encoder(), ["last-2"], ["head", "blocks.2"])[0][:2] == ["blocks.0.q", "blocks.0.v"]


def test_a_module_without_a_list_of_blocks_is_told():
    with pytest.raises(InputError, match="the module has no list of blocks"):
        usual_targets(nn.ModuleDict({"a": nn.Linear(4, 4)}), ["last-1"], [])
