"""A model with an elastic super-adapter: trained, searched, cut down and saved from Python."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from elastic import distributed
from elastic.attached.kept import known_by, place
from elastic.config import CompensationConfig, ModelConfig, TaskConfig, TimingConfig, TrainConfig
from elastic.console import say
from elastic.data.collating import collated
from elastic.data.encoding import Encoded, encode_all
from elastic.data.given import Rows, examples_of
from elastic.errors import ConfigError, DataError, ExportError, RunError, require
from elastic.evaluation.evaluate import evaluate
from elastic.files import new_directory
from elastic.formats import hf
from elastic.formats.saving import compact
from elastic.models.kinds import Kind, kind_of
from elastic.models.modules import evaluating
from elastic.searching import by_function
from elastic.searching.by_function import Counted, Function, Measured, ParetoFront, Scored
from elastic.spaces.bound import BoundSpace, SubAdapter, readable
from elastic.supernet.compensation import HALF, Compensation
from elastic.supernet.group_importance import group_importance
from elastic.supernet.held_out import HeldOut
from elastic.supernet.importance import channel_order
from elastic.supernet.moments import calibrated, second_moments
from elastic.supernet.store import save_super_adapter
from elastic.supernet.supernet import Supernet
from elastic.training.checks import require_apart
from elastic.training.one_task import require_unchanged
from elastic.training.own_loop import visited
from elastic.training.schedule import Schedule
from elastic.training.trainer import fit

if TYPE_CHECKING:
    import optuna
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Batches = Sequence[Mapping[str, Tensor]]
"""Keyword arguments of the model, (batch, length) each."""
REMEMBERED = 64
"""Examples of the last calibration whose gradients tell a search what matters."""
DECIDING = 64
"""Examples that decide how much of what is cut is made up for."""
OF_A_RUN = (
    "run", "model", "space", "ranks", "adapter", "task", "tasks", "sequence", "start_from",
    "sub_adapter", "vocab", "dry_run",
)  # fmt: skip
"""Settings of `elastic train` that `attach` has, or nobody here."""


class ElasticModel:
    """What `elastic.attach` gives: a transformers model with a super-adapter, of which one
    sub-adapter is active; the maximal one, unless it is inside `with net.active(...)`."""

    def __init__(
        self,
        supernet: Supernet,
        tokenizer: PreTrainedTokenizerBase | None = None,
        *,
        task: TaskConfig | None = None,
        base: str = "",
        is_trained: bool = False,
    ) -> None:
        """`base` is what its base model is known by; one that `is_trained` keeps the order of its
        channels."""
        self.supernet = supernet
        self.tokenizer = tokenizer
        self.task = task or TaskConfig()
        self.base = base
        self.is_trained = is_trained
        self._remembered: list[Encoded] = []

    @property
    def model(self) -> PreTrainedModel:
        """The transformers model to call; its factors (and a classifier's head) can be trained."""
        return self.supernet.model

    @property
    def space(self) -> BoundSpace:
        """The sub-adapters: `maximal()`, `minimal()`, `uniform(0.5)`, `random(...)`, `size`."""
        return self.supernet.space

    def active(
        self, sub: SubAdapter, degree: float = 0.0
    ) -> contextlib.AbstractContextManager[PreTrainedModel]:
        """Inside the block `net.model`, which it gives, runs at the sizes of `sub`, and a part
        `degree` of what is cut is made up for."""
        return self.supernet.active(sub, degree)

    def visits(
        self, step: int, steps: int, settings: TrainConfig | None = None
    ) -> tuple[SubAdapter, ...]:
        """What the 0-based `step` of `steps` of your own loop trains, one after another on the same
        batch; one sub-adapter, or three with `sampling="sandwich"`. Of the settings `stages`,
        `sampling`, `maximal_every` and `seed` are read. What the method has on a schedule moves to
        this step, too."""
        self.is_trained = True
        self.supernet.advance(step, steps)
        return visited(self.space, step, steps, settings or TrainConfig())

    def penalty(self, learning_rate: float) -> Tensor | None:
        """The method's regulariser of the active sub-adapter, to be added to your loss; None of one
        that has none, such as LoRA."""
        return self.supernet.penalty(learning_rate)

    def order_channels(
        self, data: Rows | Batches, mode: Literal["activation", "norm"] = "activation"
    ) -> None:
        """Put the channels and heads that matter first: those are what a sub-adapter keeps. Once,
        before training; `fit` does it if nobody has. The function at full size stays the same.

        `data` are rows, or batches as the model takes them; some dozens of examples are enough.
        RunError for the second time, or after training; ConfigError where the order changes what
        the model computes, for it then does not fit the space.
        """
        data = _kept(data)
        if self.is_trained:
            raise RunError("order_channels: it was trained in the order that is; do it before")
        self._order(self._batches(data, "order_channels"), mode)

    def calibrate(self, data: Rows | Batches, examples: int = 512, batch_size: int = 16) -> None:
        """See on some training examples how channels follow one another: from then on a
        sub-adapter can make up for a part of what it cuts. After training; `fit` does it itself.

        `data` are rows, of which so many `examples` are used, or batches as the model takes them.
        From rows a search also learns which groups matter. ConfigError for counts below 1.
        """
        least = min(examples, batch_size)
        require(least >= 1, f"calibrate: examples or batch_size is {least}; at least 1")
        data = _kept(data)
        if _are_batches(data):
            self._make_up(second_moments(self.supernet, self._batches(data, "calibrate")))
        else:
            self._calibrate(self._encoded(data, "calibrate")[:examples], batch_size)

    def fit(
        self,
        data: Rows,
        settings: TrainConfig | None = None,
        *,
        folder: Path | str | None = None,
    ) -> list[dict[str, float]]:
        """Train the super-adapter on rows as `elastic train` does; one line of figures per step.

        The `settings` are those of `elastic train` that say how: `batch_size`, `lr`, `stages`,
        `max_steps`, `sampling`, `distill` and so on. With a `folder`, checkpoints and metrics.jsonl
        are kept there, and the same call goes on where it was interrupted; RunError for the folder
        of another one. ConfigError for settings of a run directory, DataError names the row that
        cannot be used, TrainingError when the loss is no number.
        """
        config = settings or TrainConfig()
        self._require_meant(config)
        net, encoded = self.supernet, self._encoded(data, "fit")
        if config.packing:
            require_apart(self.model, encoded, self._pad)
        if not net.order and not self.is_trained and config.resolved_order != "none":
            some = encoded[: config.order_examples]
            batches = list(collated(some, config.batch_size, self._pad, self.model.device))
            say(f"Ordering channels by {config.resolved_order} on {len(some)} training examples")
            self._order(batches, config.resolved_order)
        part, calibration = config.compensation_in_training, encoded[: config.compensation_examples]
        if part:
            self._calibrate(calibration, config.batch_size)
        schedule = Schedule.of(config, len(encoded), distributed.count())
        say(f"Training {readable(self.space.size)} sub-adapters in one: {schedule.steps} steps")
        known = known_by(net, self.base, config, encoded)
        with place(folder, known) as run:
            self.is_trained = True
            trainer = fit(net, config, schedule, encoded, run, pad=self._pad, degree=part)
        net.activate(net.space.maximal())
        if not part:
            self._calibrate(calibration, config.batch_size)
        return [row for row in trainer.state.log_history if "loss" in row]

    def search(
        self,
        accuracy: Function | Rows,
        latency: Function | Counted | Measured = "prefill_ms",
        *,
        at_most: float | str | None = None,
        min_accuracy: float | None = None,
        trials: int = 50,
        starts: int = 12,
        examples: int | None = None,
        held_out: Rows | None = None,
        timing: TimingConfig | None = None,
        study: optuna.Study | None = None,
        seed: int = 0,
    ) -> ParetoFront:
        """Look for the sub-adapters with the best accuracy at every latency.

        Both are functions of the compact model: accuracy anything that is better when larger,
        latency anything that is better when smaller. Instead of the first, rows of a validation
        split: the share of them that is answered right. Instead of the second: params or macs,
        which are counted, prefill_ms or decode_ms, from a table that is measured here once. The
        model shares memory with the supernet: a function must not change it.

        `at_most` is a limit on the latency, in its unit or as "80%" of the full model's. An
        accuracy that is the share of so many `examples` is noisy, and the search then believes it
        less; unset, it is exact. `held_out` are rows that decide how much of what it cuts a
        sub-adapter makes up for, if the model was calibrated (`accuracy` rows do, too); without
        any, half. A `study` of Optuna brings storage and sampler of its own, and is continued up to
        so many `trials`; ours is the sampler of `elastic search`.

        ConfigError for what is no number or limit, BudgetError where nothing meets the limits,
        RunError where nothing can be searched.
        """
        net = self.supernet
        if not callable(accuracy):
            rows = examples_of(accuracy, self.task, "accuracy")
            encode_all(self._tokens, rows, self.model)  # what cannot be read is named before
            accuracy, examples = self._share_of(rows), examples or len(rows)
            held_out = rows if held_out is None else held_out
        decide = self._decide(held_out)
        importance = None
        if self._remembered:
            importance = group_importance(net, self._collated(self._remembered, 8))
        return by_function.search(
            net, accuracy, latency,
            degree=decide, at_most=at_most, min_accuracy=min_accuracy, trials=trials, starts=starts,
            examples=examples, importance=importance, timing=timing, study=study, seed=seed,
        )  # fmt: skip

    def compact(
        self, chosen: SubAdapter | Scored | str, degree: float | None = None
    ) -> PreTrainedModel:
        """A small model of plain linear layers, sliced and merged: of a sub-adapter, of one that a
        search has scored, or by name (maximal, heuristic, minimal, uniform-0.5).

        A part `degree` of what is cut is made up for; unset, as the search has it, else half, if
        the model was calibrated. What was not cut (embeddings, norms) is shared with the supernet.
        RunError for what is no point of the space.
        """
        if isinstance(chosen, Scored):
            degree = chosen.degree if degree is None else degree
            chosen = chosen.sub_adapter
        sub = self.space.named(chosen) if isinstance(chosen, str) else self.space.check(chosen)
        return compact(self.supernet, sub, self._half(sub) if degree is None else degree)

    def save(self, folder: Path | str) -> Path:
        """The super-adapter alone, for `elastic.reattach`: factors, order of channels, space, and
        what calibration saw. In place of what stood there, once all of it is written."""
        known = self.supernet.compensation
        name = self.model.name_or_path or type(self.model).__name__
        save_super_adapter(
            self.supernet, Path(folder), model=ModelConfig(path=name), base_digest=self.base,
            moments=known.moments if known else None,
        )  # fmt: skip
        return Path(folder)

    @property
    def _tokens(self) -> PreTrainedTokenizerBase:
        """ConfigError without a tokenizer, or where it ends no answer."""
        if self.tokenizer is None:
            raise ConfigError("rows need a tokenizer: elastic.attach(model, tokenizer)")
        if self.tokenizer.eos_token_id is None and kind_of(self.model) is not Kind.CLASSIFIER:
            raise ConfigError("the tokenizer has no end-of-sequence token, so no answer would end")
        return self.tokenizer

    @property
    def _pad(self) -> int:
        pad = self._tokens.pad_token_id
        return self._tokens.eos_token_id if pad is None else pad

    def _encoded(self, data: Rows, name: str) -> list[Encoded]:
        return encode_all(self._tokens, examples_of(data, self.task, name), self.model)

    def _collated(self, encoded: Sequence[Encoded], size: int) -> list[dict[str, Tensor]]:
        return list(collated(encoded, size, self._pad, self.model.device))

    def _batches(self, data: Rows | Batches, name: str) -> list[dict[str, Tensor]]:
        """Batches as they are, on the model's device, or made of rows."""
        if not _are_batches(data):
            return self._collated(self._encoded(data, name), 8)
        if self.model.config.is_encoder_decoder and not all("labels" in batch for batch in data):
            raise ConfigError(f"{name}: the decoder of this model reads labels; give batches them")
        device = self.model.device
        return [{key: value.to(device) for key, value in batch.items()} for batch in data]

    def _require_meant(self, config: TrainConfig) -> None:
        """ConfigError for settings that would do nothing here."""
        standard = TrainConfig()
        for name in OF_A_RUN:
            if getattr(config, name) != getattr(standard, name):
                raise ConfigError(
                    f"fit: {name} is a setting of elastic train; give it to attach, or leave it out"
                )
        if self.model.dtype == torch.float16 and self.model.device.type == "cpu":
            raise ConfigError(
                "fit: float16 on cpu: small gradients vanish without a loss scaler, which only "
                "accelerators have; load the model in bfloat16 or float32"
            )
        ranks = any(group.dim == "rank" for group in self.space)
        if not ranks and any("rank" in stage.train_dims for stage in config.stages):
            raise ConfigError(
                "fit: a stage opens rank, and the space has none to choose from; attach with "
                'ranks="elastic"'
            )

    def _calibrate(self, encoded: Sequence[Encoded], batch_size: int) -> None:
        self._remembered = list(encoded[:REMEMBERED])
        self._make_up(calibrated(self.supernet, encoded, batch_size=batch_size, pad=self._pad))

    def _make_up(self, moments: Mapping[str, Tensor]) -> None:
        net = self.supernet
        net.compensation = Compensation(moments, device=net.device) if moments else None

    @torch.no_grad()
    def _order(self, batches: Sequence[dict[str, Tensor]], mode: str) -> None:
        net = self.supernet
        if not batches:
            raise DataError("order_channels: no batches; give some dozens of examples")
        with net.active(net.space.maximal()), evaluating(net.model):
            before = _logits(net.model, batches[0])
            order = channel_order(net.model, net.space, mode, batches)
            net.reorder(order)
            require_unchanged(before, _logits(net.model, batches[0]), net.declared)

    def _share_of(self, rows: Sequence[Any]) -> Function:
        tokenizer = self._tokens

        def share(model: PreTrainedModel) -> float:
            return evaluate(model, tokenizer, rows, quiet=True).accuracy

        return share

    def _half(self, sub: SubAdapter) -> float:
        net = self.supernet
        return HALF if net.compensation is not None and net.cuts(sub) else 0.0

    def _decide(self, held_out: Rows | None) -> Any:
        """How much of what it cuts a sub-adapter makes up for."""
        if held_out is None or self.supernet.compensation is None:
            return self._half
        encoded = self._encoded(held_out, "held_out")[:DECIDING]
        decide = HeldOut(self.supernet, CompensationConfig(), self._collated(encoded, 8))
        return lambda sub: decide(sub).degree


def save_compact(
    model: PreTrainedModel,
    folder: Path | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Path:
    """A compact model as a folder that transformers loads, in place of what stood there, once all
    of it is written. Where layers have sizes of their own it holds a small model class: then
    `from_pretrained`, of the tokenizer too, needs `trust_remote_code=True`. ExportError for what
    cannot be a folder."""
    if reason := hf.why_not(model):
        raise ExportError(f"{folder}: {reason}")
    with new_directory(Path(folder)) as building:
        hf.write(model, tokenizer, building)
    return Path(folder)


def _kept(data: Any) -> Any:
    """The same; as a list where looking at it uses it up."""
    return list(data) if isinstance(data, Iterator) else data


def _are_batches(data: Any) -> bool:
    """Whether these are keyword arguments of a model, and no rows."""
    if isinstance(data, str | Path | Mapping) or not hasattr(data, "__iter__"):
        return False
    first = next(iter(data), None)
    ids = first.get("input_ids") if isinstance(first, Mapping) else None
    return isinstance(ids, Tensor) and ids.dim() == 2


def _logits(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Of the first row without its padding, float32."""
    ids = batch["input_ids"][:1]
    if "attention_mask" in batch:
        ids = ids[:, batch["attention_mask"][0].bool()]
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    return model(input_ids=ids, **more).logits.float()
