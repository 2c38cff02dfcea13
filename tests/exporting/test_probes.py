"""The comparison of a written model with the supernet finds what differs, but for ties."""

import numpy as np
import pytest
import torch

from elastic.errors import ExportError
from elastic.exporting import probes
from elastic.exporting.probes import NEW_TOKENS, Agreement, Probe, agreement, require_agreement
from tests.helpers import tiny


class Replay:
    """A runner that says the logits it was given, one row after another."""

    def __init__(self, logits):
        self.logits = np.array(logits, dtype=float)

    def prefill(self, input_ids):
        self.fed, self.step = [input_ids], 0
        return self.logits[None, 0]

    def decode(self, input_ids):
        self.fed.append(input_ids)
        self.step += 1
        return self.logits[None, self.step]


def probe(logits) -> Probe:
    logits = np.array(logits, dtype=float)
    return Probe(np.array([[5, 6, 7]]), logits.argmax(-1)[None], logits)


EXPECTED = [[1.0, 2.0, 0.0], [0.0, 1.0, -4.0], [3.0, 0.0, 0.0]]


def test_agreement_with_oneself():
    runner = Replay(EXPECTED)
    assert agreement(runner, [probe(EXPECTED)]) == Agreement(0.0, 4.0, 3, 3, False)
    # The prompt, then the supernet's tokens: the last one is never fed.
    assert [ids.tolist() for ids in runner.fed] == [[[5, 6, 7]], [[1]], [[1]]]


@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("which", range(2))
def test_agreement_reports_the_largest_difference(step, which):
    wrong = np.array(EXPECTED)
    wrong[step, 2] -= 0.25
    probes = [probe(EXPECTED), probe(EXPECTED)]

    class Second(Replay):
        def prefill(self, input_ids):
            self.calls = getattr(self, "calls", -1) + 1
            self.logits = np.array(wrong if self.calls == which else EXPECTED)
            return super().prefill(input_ids)

    assert agreement(Second(EXPECTED), probes) == Agreement(0.25, 4.0, 6, 6, False)


@pytest.mark.parametrize("step", range(3))
@pytest.mark.parametrize("side", ["found", "expected"])
def test_agreement_flags_nan(step, side):
    broken = np.array(EXPECTED)
    broken[step, 1] = np.nan
    mine, theirs = (broken, EXPECTED) if side == "found" else (EXPECTED, broken)
    found = agreement(Replay(mine), [probe(theirs), probe(theirs)])
    assert np.isnan(found.max_abs_diff)
    assert not found.greedy_tokens_equal and found.decided


def test_what_is_all_nan_is_told_as_such():
    """As of a merge whose weights are far too large."""
    broken = np.full((3, 3), np.nan)
    for mine in (broken, np.array(EXPECTED)):
        found = agreement(Replay(mine), [probe(broken)])
        with pytest.raises(ExportError, match="merge: its logits are not numbers"):
            require_agreement("merge", found, 1e-4)


def test_what_rounds_on_purpose_may_not_round_to_infinity():
    broken = np.array(EXPECTED)
    broken[1, 2] = np.inf
    with pytest.raises(ExportError, match="hf: its logits are infinite"):
        require_agreement("hf", agreement(Replay(broken), [probe(EXPECTED)]), None)
    cut = np.array(EXPECTED)
    cut[:, 2] = -np.inf  # a token that is cut, in both
    require_agreement("hf", agreement(Replay(cut), [probe(cut)]), None)


def test_a_tie_may_fall_either_way_but_a_decided_token_may_not():
    tie = probe([[1.0, 1.001, 0.0]])
    other = agreement(Replay([[1.001, 1.0, 0.0]]), [tie])
    assert not other.greedy_tokens_equal and not other.decided
    clear = probe([[1.0, 2.0, 0.0]])
    shifted = agreement(Replay([[2.4, 2.3, 0.0]]), [clear])  # 1.4 off explains a gap of 1
    assert not shifted.greedy_tokens_equal and not shifted.decided


def test_probes_are_the_supernets_own_greedy_continuation():
    net = tiny.supernet(heads=True)
    sub = net.space.uniform(0.5)
    prompt = tiny.tokens(1, 5)
    with net.active(sub) as model:
        found = probes.probe(model, prompt.numpy())
    ids = prompt
    for step in range(NEW_TOKENS):
        with net.active(sub) as model:
            logits = tiny.logits(model, ids)[0, -1]
        np.testing.assert_allclose(found.logits[step], logits.numpy(), rtol=0, atol=1e-9)
        assert found.tokens[0, step] == int(logits.argmax())
        ids = torch.cat([ids, logits.argmax()[None, None]], dim=1)
    assert net.current == net.space.maximal()
