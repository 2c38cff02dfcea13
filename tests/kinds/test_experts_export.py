"""Mixtures of experts as files: folders of the family's class, or of a small one, and graphs."""

from __future__ import annotations

import pytest
import torch

from elastic.formats import hf
from elastic.spaces.bound import SubAdapter
from elastic.supernet.compact import compact
from tests.helpers.families import output
from tests.helpers.laws import close
from tests.helpers.mixtures import FAMILIES, net_of

SHARED = {"deepseek-v3"}
"""Families whose configuration has one width for routed and shared experts."""


@pytest.mark.parametrize("family", FAMILIES)
def test_a_written_model_is_the_same_function(family, tmp_path):
    """Of as many experts of one width in all layers, which the class's own config can say, and of
    many."""
    net = net_of(family)
    one = {g.name: g.choices[0 if g.dim == "rank" else -1] for g in net.space}
    mixed = {g.name: g.choices[-1 if ".0." in g.name else -2] for g in net.space}
    for number, choices in enumerate((one, mixed)):
        model = compact(net, SubAdapter(tuple(choices.items())))
        folder = hf.write(model, None, tmp_path / str(number))
        again = hf.load(folder, torch.float64)
        again.set_experts_implementation("eager")
        close(output(again), output(model), 1e-10)
        plain = not (folder / hf.CODE).exists()
        assert plain is (number == 0 and family not in SHARED)
