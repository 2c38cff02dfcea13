"""What held-out examples decide, and what a run keeps of it."""

from __future__ import annotations

import math

import pytest
import torch

from elastic.config import CompensationConfig
from elastic.data import load_task
from elastic.data.answers import answer_logits
from elastic.data.collating import IGNORED
from elastic.data.encoding import encode_all
from elastic.errors import RunError
from elastic.run import Chosen
from elastic.supernet.compensation import Compensation
from elastic.supernet.held_out import Compensated, HeldOut, compensated, decide, mean_loss
from elastic.supernet.moments import Moments, calibrated
from elastic.supernet.store import MOMENTS, load_run
from tests.helpers.laws import batch_of, loss
from tests.helpers.tiny_runs import copy_run


@pytest.fixture
def loaded(trained, tmp_path):
    """A run that may be written to, its tokenizer and its supernet."""
    run = copy_run(trained, tmp_path / "run")
    _, base, net = load_run(run)
    return run, base.tokenizer, net


def canned(losses: dict[float, float]):
    """Divergences by degree, and the degrees that were asked."""
    asked = []

    def divergence(net) -> float:
        asked.append(net.degree)
        return losses[net.degree]

    return divergence, asked


@pytest.mark.parametrize(
    "losses, best",
    [
        ({0.0: 3.0, 0.5: 1.0, 1.0: 2.0}, 0.5),
        ({0.0: 1.0, 0.5: 2.0, 1.0: 3.0}, 0.0),
        ({0.0: 1.0, 0.5: 1.0, 1.0: 1.0}, 0.0),
        ({0.0: math.nan, 0.5: 2.0, 1.0: 1.0}, 1.0),
        ({0.0: math.nan, 0.5: math.inf, 1.0: math.nan}, 0.0),
    ],
)
def test_the_lowest_divergence_decides(loaded, losses, best):
    _, _, net = loaded
    divergence, asked = canned(losses)
    found = decide(net, net.space.minimal(), [1.0, 0.0, 0.5], lambda model: divergence(net))
    assert asked == [0.0, 0.5, 1.0]
    assert found.degree == best
    finite = {degree: value for degree, value in losses.items() if math.isfinite(value)}
    assert {float(degree): value for degree, value in found.losses.items()} == finite
    assert Compensated.of(found.as_dict()) == found


def test_nothing_is_asked_where_there_is_nothing_to_decide(loaded):
    _, _, net = loaded
    asked, _ = canned({})  # would fail
    assert decide(net, net.space.maximal(), [0.0, 1.0], asked) == Compensated()
    assert decide(net, net.space.minimal(), [0.75], asked) == Compensated(0.75)
    net.compensation = None
    assert decide(net, net.space.minimal(), [0.0, 1.0], asked) == Compensated()


def test_the_loss_is_that_of_an_answer_token(loaded):
    _, _, net = loaded
    one, two = batch_of("a b c"), batch_of("d e f g", "h i")
    tokens = [int((batch["labels"] != -100).sum()) for batch in (one, two)]
    expected = (loss(net, one) + loss(net, two)) / sum(tokens)
    assert mean_loss(net.model, [one, two]) == pytest.approx(expected, rel=1e-5)


def test_a_divergence_is_that_from_the_full_model(loaded):
    run, tokenizer, net = loaded
    task = load_task(run.config().task, run.config().seed)
    held = HeldOut.of(run, net, tokenizer, task, CompensationConfig(examples=5))
    maximal, minimal = net.space.maximal(), net.space.minimal()
    total, tokens = 0.0, 0
    for batch in held.batches:
        logits = {}
        for sub in (maximal, minimal):
            with net.active(sub) as model, torch.no_grad():
                logits[sub], labels = answer_logits(model, batch)
        full, small = (logits[sub][labels != IGNORED].log_softmax(-1) for sub in logits)
        total, tokens = total + float((full.exp() * (full - small)).sum()), tokens + len(full)
    with net.active(minimal) as model:
        assert held.divergence(model) == pytest.approx(total / tokens, rel=1e-5)
        assert held.divergence(model) > 1e-6
    with net.active(maximal) as model:
        assert held.divergence(model) == pytest.approx(0, abs=1e-7)


def test_of_what_the_full_model_says_no_more_is_held_than_there_is_room_for(loaded):
    run, tokenizer, net = loaded
    task = load_task(run.config().task, run.config().seed)
    held = HeldOut.of(run, net, tokenizer, task, CompensationConfig(room_mb=0))
    assert len(held.batches) > 1
    first = HeldOut(net, CompensationConfig(), held.batches[:1])
    with net.active(net.space.minimal()) as model:
        assert held.divergence(model) == first.divergence(model) != 0


@pytest.mark.parametrize("rows, batches", [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3), (9, 3)])
def test_few_rows_are_those_of_the_first_batches(loaded, rows, batches):
    _, _, net = loaded
    given = [batch_of("a b", "c d e"), batch_of("f g", "h i j"), batch_of("k l m")]
    held, first = (HeldOut(net, CompensationConfig(), each) for each in (given, given[:batches]))
    with net.active(net.space.minimal()) as model:
        assert held.divergence(model, rows) == first.divergence(model) != 0


def test_test_examples_decide_nothing(loaded):
    run, tokenizer, net = loaded
    config = run.config()
    task = load_task(config.task, config.seed)

    class Guarded:
        train, validation = task.train, task.validation

    chooser = HeldOut.of(run, net, tokenizer, Guarded(), CompensationConfig(examples=5))
    assert sum(len(batch["labels"]) for batch in chooser.batches) == 5
    assert chooser(net.space.minimal()).losses


def test_what_an_earlier_version_trained_gets_its_moments_now(loaded):
    run, tokenizer, net = loaded
    file, config = run.super_adapter / MOMENTS, run.config()
    file.unlink()
    net.compensation = None
    asked = Chosen("minimal")
    minimal, settings = net.space.minimal(), CompensationConfig(degrees=[0.0, 1.0])
    with compensated(run, net, tokenizer, asked, minimal, settings) as (model, found):
        assert model is net.model and net.degree == found.degree
    assert set(found.losses) == {"0", "1"}
    examples = encode_all(tokenizer, load_task(config.task, config.seed).train, net.model)
    known = calibrated(net, examples, batch_size=config.batch_size, pad=tokenizer.pad_token_id)
    kept = Moments(file)
    assert set(kept) == set(known) == set(net.space.reading)
    for site, moment in known.items():
        torch.testing.assert_close(kept[site], moment, rtol=0, atol=1e-3 * float(moment.max()))


def test_turned_off_it_is_off_whatever_was_chosen(loaded):
    run, tokenizer, net = loaded
    chosen = Chosen("minimal", compensation={"degree": 1.0, "held_out_losses": {}})
    minimal = net.space.minimal()
    settings = CompensationConfig(degrees=[0.0])
    with compensated(run, net, tokenizer, chosen, minimal, settings) as (_, found):
        assert found == Compensated() and net.compensation is None


@pytest.mark.parametrize("sequential", [False, True])
def test_what_was_chosen_is_kept(loaded, sequential):
    run, tokenizer, net = loaded
    about = {"degree": 1.0, "sequential": sequential, "held_out_losses": {"1": 2.0}}
    chosen, minimal = Chosen("minimal", compensation=about), net.space.minimal()
    opened = compensated(run, net, tokenizer, chosen, minimal, CompensationConfig())
    with opened as (model, found):
        assert found == Compensated(1.0, sequential, {"1": 2.0})
        # What is fitted is a model of its own.
        assert (model is net.model) != sequential


def test_a_fit_is_kept_only_if_it_helps(loaded, monkeypatch):
    run, tokenizer, net = loaded
    config = run.config()
    task = load_task(config.task, config.seed)
    held = HeldOut.of(run, net, tokenizer, task, CompensationConfig())
    minimal = net.space.minimal()
    for fitted, better in ((0.5, True), (1.5, False), (math.nan, False)):
        monkeypatch.setattr(held, "divergence", lambda model, loss=fitted: loss)
        found, _ = held.refined(minimal, Compensated(1.0, losses={"1": 1.0}))
        assert found.degree == 1.0 and found.sequential is better
        assert found.losses.get("sequential", math.nan) == pytest.approx(fitted, nan_ok=True)
    off = HeldOut(net, CompensationConfig(sequential=False), held.batches)
    assert off.refined(minimal, Compensated(1.0))[0] == Compensated(1.0)


@pytest.mark.parametrize("saved", [{}, {"degree": 2}, {"degree": "half"}, 0.5])
def test_what_is_no_compensation_is_refused(saved):
    with pytest.raises(RunError, match="degree"):
        Compensated.of(saved)


def test_settings_reach_the_solutions(loaded):
    run, tokenizer, net = loaded
    config = run.config()
    task = load_task(config.task, config.seed)
    settings = CompensationConfig(ridge=0.5, room_mb=3)
    HeldOut.of(run, net, tokenizer, task, settings)
    assert isinstance(net.compensation, Compensation)
    assert net.compensation.ridge == 0.5 and net.compensation.room == 3e6
