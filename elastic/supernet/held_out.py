"""What held-out examples say is best for a sub-adapter: to make up for nothing of what it cuts, for
all, or for a part (`elastic.supernet.compensation` has the formula).

What is best answers most like the full model, its maximal sub-adapter. The loss on the labels would
say something else: where training has made models too sure of themselves, one that is less sure has
the lower loss and fewer right answers (`tests/benchmarks/decisions.py`)."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from elastic.console import track
from elastic.data.answers import answer_logits, answer_loss
from elastic.data.collating import IGNORED, collated
from elastic.data.encoding import encode_all
from elastic.errors import RunError
from elastic.spaces.bound import SubAdapter
from elastic.supernet.compact import compact
from elastic.supernet.compensation import Compensation
from elastic.supernet.examples import task_of
from elastic.supernet.moments import calibrated, save
from elastic.supernet.routed import widths_of
from elastic.supernet.sequential import can_fit, fit_
from elastic.supernet.store import MOMENTS, saved_compensation

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from elastic.config import CompensationConfig, TrainConfig
    from elastic.data.task import Example, Task
    from elastic.run import Chosen, Run
    from elastic.supernet.supernet import Supernet


SEQUENTIAL = "sequential"
LOW = -1e9
"""Of a token that cannot be said: far below every logit, and a number, also times 0."""


@dataclass(frozen=True)
class Compensated:
    """How much of what it cuts a sub-adapter makes up for, and why."""

    degree: float = 0.0
    sequential: bool = False
    """Whether it was fitted to the full model on top of that (`elastic.supernet.sequential`)."""
    losses: Mapping[str, float] = field(default_factory=dict)
    """Divergence from the full model's answers at every degree that was tried, and when fitted, as
    `divergence` has it; none where nothing had to be decided."""

    def as_dict(self) -> dict[str, Any]:
        """For JSON; `of` reads it back."""
        return {
            "degree": self.degree,
            "sequential": self.sequential,
            "held_out_losses": dict(self.losses),
        }

    @classmethod
    def of(cls, saved: Mapping[str, Any]) -> Compensated:
        """From what `as_dict` gave; RunError for something else."""
        degree = saved.get("degree") if isinstance(saved, Mapping) else None
        losses = saved.get("held_out_losses", {}) if degree is not None else {}
        if not isinstance(losses, Mapping) or not all(
            isinstance(x, float) for x in losses.values()
        ):
            raise RunError(f"compensation of a sub-adapter: held_out_losses is {losses!r}")
        if not isinstance(degree, int | float) or not 0 <= degree <= 1:
            raise RunError(
                f"compensation of a sub-adapter: expected a degree in [0, 1], it is {saved!r}"
            )
        return cls(degree, bool(saved.get("sequential")), losses)

    def __str__(self) -> str:
        if not self.degree and not self.sequential:
            return "nothing of what is cut is made up for"
        fitted = ", fitted to the full model" if self.sequential else ""
        return f"{self.degree:.0%} of what is cut is made up for{fitted}"


class HeldOut:
    """Decides by the validation examples of a run's task: by as many as `compensation.room_mb` has
    room for what the full model says to them."""

    def __init__(
        self, net: Supernet, config: CompensationConfig, batches: Sequence[dict[str, Tensor]]
    ) -> None:
        self.net, self.config, self.batches = net, config, batches
        self.examples: Callable[[], Sequence[dict[str, Tensor]]] = list
        """Gives the training examples that a fit sees."""
        self.is_on = config.is_on
        """Whether what is cut is made up for at all."""
        self._decided: dict[SubAdapter, Compensated] = {}

    @classmethod
    def of(
        cls,
        run: Run,
        net: Supernet,
        tokenizer: PreTrainedTokenizerBase,
        task: Task,
        config: CompensationConfig,
    ) -> HeldOut:
        """With the moments of the run's super-adapter. One that an earlier version trained gets
        them now, from as many of its training examples as training takes by default."""
        trained = run.config()
        validation = task.validation[: config.examples]
        held_out = cls(net, config, _batches(net.model, tokenizer, validation, trained.batch_size))
        if not config.is_on or not trained.compensation_examples:
            net.compensation, held_out.is_on = None, False
            return held_out
        net.compensation = net.compensation or saved_compensation(run.super_adapter, net)
        if net.compensation is None and (net.space.reading or widths_of(net.space)):
            examples = task.train[: trained.compensation_examples]
            encoded, pad = encode_all(tokenizer, examples, net.model), tokenizer.pad_token_id
            found = calibrated(net, encoded, batch_size=trained.batch_size, pad=pad)
            save(found, run.super_adapter / MOMENTS)
            net.compensation = saved_compensation(run.super_adapter, net)
        if net.compensation:
            moments = net.compensation.moments
            room, device = config.room_mb * 1e6, net.device
            net.compensation = Compensation(moments, config.ridge, room, device)
        held_out.examples = functools.cache(
            lambda: fitted_batches(trained, net.model, tokenizer, task, config)
        )
        return held_out

    def chosen(self, chosen: Chosen, sub: SubAdapter) -> Compensated:
        """As the file of the chosen one says, where it does; else what is best. Nothing where it
        was turned off."""
        if chosen.compensation is None or not self._makes_up(sub):
            return self(sub)
        return Compensated.of(chosen.compensation)

    def best(self, chosen: Chosen, sub: SubAdapter) -> tuple[Compensated, PreTrainedModel]:
        """The same, and the model that is then; what is not in a file may be fitted, too."""
        made_up = self.chosen(chosen, sub)
        if chosen.compensation is not None:
            return made_up, self.model(sub, made_up)
        return self.refined(sub, made_up)

    def model(self, sub: SubAdapter, made_up: Compensated) -> PreTrainedModel:
        """The sub-adapter as a model of its own, sliced and merged."""
        small = compact(self.net, sub, made_up.degree)
        if made_up.sequential:  # which does not look at the head
            fit_(small, self.net, sub, self.examples())
        return small

    def refined(self, sub: SubAdapter, made_up: Compensated) -> tuple[Compensated, PreTrainedModel]:
        """With the fit to the full model, if the held-out examples say that it is better, and the
        model that is then; asked once."""
        if SEQUENTIAL in made_up.losses:
            return made_up, self.model(sub, made_up)
        net, whole = self.net, self.net.space.with_whole_vocabulary(sub)
        if sub != whole:
            made_up, small = self.refined(whole, made_up)
            return made_up, net.cut_vocabulary_(small, sub)
        small = compact(net, sub, made_up.degree)
        tried = self.config.sequential and can_fit(net.model)
        if not tried or not self._makes_up(sub):
            return made_up, small
        before = made_up.losses.get(f"{made_up.degree:g}")
        before = self.divergence(small) if before is None else before
        changed = fit_(small, net, sub, self.examples())
        after = self.divergence(small)
        losses = {**made_up.losses, f"{made_up.degree:g}": before, SEQUENTIAL: after}
        better = bool(changed) and after < before
        finite = {name: loss for name, loss in losses.items() if math.isfinite(loss)}
        decided = Compensated(made_up.degree, better, finite)
        return decided, small if better else compact(net, sub, made_up.degree)

    def _makes_up(self, sub: SubAdapter) -> bool:
        """Whether there is something to make up for, and it is to be."""
        cuts = self.net.compensation is not None and self.net.cuts(sub)
        return cuts or (self.is_on and self.net.drops_experts(sub))

    def __call__(self, sub: SubAdapter) -> Compensated:
        """How much is best for a sub-adapter, decided once, by a head that knows all tokens: to
        one that lacks some, minus infinity would be all that counts."""
        sub = self.net.space.with_whole_vocabulary(sub)
        if sub not in self._decided:
            self._decided[sub] = decide(self.net, sub, self.config.degrees, self.divergence)
        return self._decided[sub]

    def divergence(self, model: PreTrainedModel, rows: int | None = None) -> float:
        """From the full model, on the held-out examples, or on the first batches that have so many
        of them."""
        asked = self._answered
        if rows is not None:
            ends = itertools.accumulate(len(batch["labels"]) for batch, _ in asked)
            asked = asked[: sum(end < rows for end in ends) + 1]
        return divergence(model, asked)

    @functools.cached_property
    def _answered(self) -> list[tuple[dict[str, Tensor], Tensor]]:
        """The first batches, one at least, with the logits of the maximal sub-adapter for their
        answers."""
        found: list[tuple[dict[str, Tensor], Tensor]] = []
        with self.net.active(self.net.space.maximal()) as model, torch.no_grad():
            for batch in track(self.batches, "asking the full model"):
                if sum(logits.nbytes for _, logits in found) > self.config.room_mb * 1e6:
                    break
                found.append((batch, answer_logits(model, batch)[0]))
        return found


def fitted_batches(
    trained: TrainConfig,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    config: CompensationConfig,
) -> list[dict[str, Tensor]]:
    """The training examples that a fit to the full model sees, in two batches at least: one of them
    chooses the ridge."""
    examples = task.train[: config.fitted_examples]
    size = min(trained.batch_size, max(1, len(examples) // 2))
    return _batches(model, tokenizer, examples, size)


def _batches(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[Example],
    size: int,
) -> list[dict[str, Tensor]]:
    encoded = encode_all(tokenizer, examples, model)
    return list(collated(encoded, size, tokenizer.pad_token_id, model.device))


@contextlib.contextmanager
def compensated(
    run: Run,
    net: Supernet,
    tokenizer: PreTrainedTokenizerBase,
    chosen: Chosen,
    sub: SubAdapter,
    config: CompensationConfig,
) -> Iterator[tuple[PreTrainedModel, Compensated]]:
    """The chosen one, active in the supernet, or as a model of its own where it was fitted, and how
    much it makes up for; data is read only where that has to be decided, or to fit."""
    made_up = Compensated()
    if chosen.compensation is not None or net.cuts(sub) or net.drops_experts(sub):
        task = task_of(run)
        held_out = HeldOut.of(run, net, tokenizer, task, config)
        made_up = held_out.chosen(chosen, sub)
        if made_up.sequential:
            yield held_out.model(sub, made_up), made_up
            return
    with net.active(sub, made_up.degree) as model:
        yield model, made_up


def decide(
    net: Supernet,
    sub: SubAdapter,
    degrees: Sequence[float],
    divergence: Callable[[PreTrainedModel], float],
) -> Compensated:
    """The degree with the lowest divergence; of equals the smallest.

    Without moments, or for a sub-adapter that cuts no channels, there is nothing to decide. What is
    no number never wins.
    """
    if net.compensation is None or not net.cuts(sub):
        return Compensated()
    if len(set(degrees)) == 1:
        return Compensated(degrees[0])  # unasked
    losses = {}
    for degree in track(sorted(set(degrees)), "how much to make up for"):
        with net.active(sub, degree) as model:
            losses[degree] = divergence(model)
    finite = {degree: loss for degree, loss in losses.items() if math.isfinite(loss)}
    best = min(finite, key=lambda degree: (finite[degree], degree), default=0.0)
    return Compensated(best, losses={f"{degree:g}": loss for degree, loss in finite.items()})


@torch.no_grad()
def divergence(model: PreTrainedModel, asked: Sequence[tuple[dict[str, Tensor], Tensor]]) -> float:
    """Mean over answer tokens of KL(full ‖ model), in nats; of a number, half the mean squared
    difference. `asked` are batches with the full model's logits (batch, width, vocabulary) of their
    answers.

    Of a head that lacks tokens, from which all are infinitely far: KL among those that it has, and
    -log of the probability that the full model gives these together.
    """
    total = tokens = 0.0
    for batch, answers in track(asked, "asking held-out examples"):
        logits, labels = answer_logits(model, batch)
        counted = labels != IGNORED
        lacking = logits.isneginf()
        if lacking.any():
            before = answers.logsumexp(-1)
            logits, answers = (each.masked_fill(lacking, LOW) for each in (logits, answers))
            total += float((before - answers.logsumexp(-1))[counted].sum())
        total += float(answer_loss(logits, labels, answers, distill=1.0))
        tokens += float(counted.sum())
    return total / max(tokens, 1)


@torch.no_grad()
def mean_loss(model: PreTrainedModel, batches: Sequence[dict[str, Tensor]]) -> float:
    """Of an answer token; of a number, half the mean squared error."""
    total = tokens = 0.0
    for batch in track(batches, "asking held-out examples"):
        logits, labels = answer_logits(model, batch)
        total += float(answer_loss(logits, labels))
        tokens += float((labels != IGNORED).sum())
    return total / max(tokens, 1)
