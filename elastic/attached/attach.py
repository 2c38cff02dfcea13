"""A super-adapter on a transformers model in memory: a new one, or one that was saved."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from elastic.adapters import METHODS, check
from elastic.adapters.experts import ElasticExperts
from elastic.adapters.layers import ElasticLinear
from elastic.attached.fingerprint import fingerprint
from elastic.attached.model import ElasticModel
from elastic.config import AdapterConfig, TaskConfig, TrainConfig
from elastic.config.model import SCORE
from elastic.errors import ConfigError, ModelError, unknown
from elastic.models.head import describe_
from elastic.models.kinds import Kind, classes_of, exact_, kind_of
from elastic.models.modules import as_cut_, linear_, modules_of
from elastic.models.wrappers import text_config
from elastic.spaces.declared import SearchSpace
from elastic.supernet.discovery import AUTO, AUTO_DEEP, discover, require_fits, shipped_for
from elastic.supernet.store import load_super_adapter
from elastic.supernet.supernet import Supernet
from elastic.supernet.wrapped import placed

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def attach(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    space: str | Mapping[str, Any] | SearchSpace = AUTO,
    method: str = "lora",
    max_rank: int = 32,
    adapter: AdapterConfig | None = None,
    ranks: Literal["auto", "elastic", "whole"] = "auto",
    task: TaskConfig | None = None,
    seed: int = 0,
) -> ElasticModel:
    """Put an elastic super-adapter on a model, which is changed in place: frozen, its linear layers
    wrapped.

        net = elastic.attach(model, tokenizer, space="auto", max_rank=16)
        net.fit(rows)
        front = net.search(accuracy=lambda small: my_score(small), at_most="80%")
        elastic.save_compact(net.compact(front.best), "small", tokenizer)

    `space`: a shipped search space, a YAML file, or what such a file says; auto: the one shipped
    for this type of model, else what the structure of its modules says; auto-deep: that, with the
    number of blocks that run. `method` and `max_rank`, or
    all settings of an `adapter`. `ranks` as in `TrainConfig`. `task` says what the fields of rows
    mean (its `prompt`, `second`, `answer`, `options`, `cutoff`); the tokenizer is needed for rows.

    ConfigError for a space or a method that does not fit the model, ModelError for a model that
    carries an adapter already.
    """
    if adapter is None:
        if method not in METHODS:
            raise ConfigError(f"attach: {unknown('method', method, METHODS)}")
        adapter = AdapterConfig(method=method, rank=max_rank)
    elif (method, max_rank) != ("lora", 32):
        raise ConfigError("attach: adapter says method and rank; leave out method and max_rank")
    _require_bare(model)
    model = exact_(linear_(as_cut_(model))).eval()
    if kind_of(model) is Kind.CLASSIFIER and len(classes_of(model)) == 1:
        describe_(model.config, SCORE)  # one class tells nothing apart: it is a number
    declared = _space(space, model)
    if declared.cuts_vocabulary:
        raise ConfigError(
            f"attach: {declared.source} cuts the vocabulary, and which tokens a task needs is "
            "known to elastic train alone; leave the group of dim vocab out"
        )
    settings = TrainConfig(ranks=ranks, adapter=adapter, seed=seed)
    if settings.has_whole_ranks:
        if ranks == "whole" and declared.has_ranks_alone:
            raise ConfigError(
                f"ranks whole: {declared.source} has nothing but ranks to choose from; give "
                "elastic, or another space"
            )
        declared = declared.with_whole_ranks()
    check(adapter, model, declared.bind(model, adapter.rank))
    require_fits(model, declared, adapter.rank)
    known_by = fingerprint(model)
    net = Supernet(model, declared, adapter, seed=seed)
    return ElasticModel(net, tokenizer, task=task, base=known_by)


def reattach(
    model: PreTrainedModel,
    folder: Path | str,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    task: TaskConfig | None = None,
) -> ElasticModel:
    """A super-adapter that `ElasticModel.save` wrote, on the base model that it was trained on,
    which is changed in place. BaseMismatch on another one, RunError for another folder, ModelError
    for a model that carries an adapter already."""
    _require_bare(model)
    model = exact_(linear_(as_cut_(model))).eval()
    known_by = fingerprint(model)
    net = load_super_adapter(model, known_by, Path(folder))
    return ElasticModel(net, tokenizer, task=task, base=known_by, is_trained=True)


def _space(space: str | Mapping[str, Any] | SearchSpace, model: PreTrainedModel) -> SearchSpace:
    if isinstance(space, SearchSpace):
        return space
    if not isinstance(space, str):
        return SearchSpace.from_dict(space)
    if space == AUTO_DEEP:
        return discover(model, deep=True)
    if space != AUTO:
        return placed(SearchSpace.load(space), model)
    shipped = shipped_for(text_config(model.config).model_type)
    return placed(shipped, model) if shipped else discover(model)


def _require_bare(model: PreTrainedModel) -> None:
    """ModelError for a model whose linear layers are wrapped already."""
    if hasattr(model, "peft_config"):
        raise ModelError(
            "attach: the model carries an adapter of PEFT; merge it first (merge_and_unload), or "
            "take it over with elastic train --adapter.from FOLDER"
        )
    if any(next(modules_of(model, kind), None) for kind in (ElasticLinear, ElasticExperts)):
        raise ModelError("attach: the model carries a super-adapter already; load the base anew")
