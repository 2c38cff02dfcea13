"""Families whose blocks are of several kinds: what is found in them obeys the laws."""

from __future__ import annotations

import random

import pytest
import torch

from elastic.formats import hf
from elastic.supernet.discovery import discover
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny
from tests.helpers.families import output
from tests.helpers.hybrids import HYBRIDS, hybrid, runnable_
from tests.helpers.laws import close, one_function

GENERATED = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": tiny.PAD}
PRECISION = 1e-5
"""Norms, routers and scans round to float32, whatever the type."""


@pytest.mark.parametrize("family", HYBRIDS)
def test_active_sliced_merged_and_reloaded_are_one_function(family, tmp_path):
    base = hybrid(family)
    net = Supernet(hybrid(family), discover(base), tiny.ADAPTERS["lora"])
    with torch.no_grad():
        net.reorder(tiny.permutations(net))
        full = output(base)
        close(output(net.model), full, PRECISION)
        tiny.randomize_(net)
        for sub in (net.space.minimal(), net.space.random(random.Random(1))):
            expected, small = one_function(net, sub, output, PRECISION)
            assert (expected - full).abs().max() > 1e-3 * full.abs().max()
        again = runnable_(hf.load(hf.write(small, None, tmp_path), torch.float64))
        close(output(again), expected, PRECISION)
        with net.active(sub):
            tokens = net.model.generate(tiny.tokens(2, 6), **GENERATED)
        assert torch.equal(small.generate(tiny.tokens(2, 6), use_cache=False, **GENERATED), tokens)
        assert torch.equal(again.generate(tiny.tokens(2, 6), **GENERATED), tokens)
