"""Search spaces of a language model inside of a larger class: where they are, and where not."""

from __future__ import annotations

import inspect
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from elastic.config import ModelConfig
from elastic.errors import ConfigError
from elastic.models import loading
from elastic.models.packaged import PACKAGED
from elastic.models.wrappers import auto_for, is_in, language_model, outside
from elastic.spaces.declared import SearchSpace
from elastic.spaces.pattern import matching

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from elastic.spaces.bound import BoundSpace


def placed_in(space: SearchSpace, config: ModelConfig) -> SearchSpace:
    """The space as `placed` has it for the model that this is the configuration of; reads no
    weights."""
    # Those that come in packages are models of text, and need not be there to be told so.
    if config.path in PACKAGED or auto_for(loading.architecture_of(config)) is None:
        return space
    return placed(space, loading.skeleton(config))


def placed(space: SearchSpace, model: PreTrainedModel) -> SearchSpace:
    """The space with the names that its blocks have in this model: `model.layers.*` of a language
    model of its own is `model.language_model.layers.*` inside of another. Blocks that the model has
    under the names declared stay as they are, and so do those that it has nowhere."""
    inside = language_model(model)
    if not inside:
        return space
    names = [name for name, _ in model.named_modules()]
    sections = (
        replace(section, blocks=_found(section.blocks, names, inside)) for section in space.sections
    )
    return SearchSpace(tuple(sections), space.source)


def _found(blocks: str, names: list[str], inside: str) -> str:
    parts = re.split(r"\.(?![^{]*})", blocks)  # the points between braces are those of ranges
    below = [".".join([inside, *parts[start:]]) for start in range(len(parts))]
    return next((each for each in (blocks, *below) if _matches(each, names)), blocks)


def _matches(blocks: str, names: list[str]) -> bool:
    pattern = matching(blocks, "blocks")
    return any(pattern.fullmatch(name) for name in names)


def require_text(model: PreTrainedModel, bound: BoundSpace, source: str) -> None:
    """ConfigError for a space with layers that no text passes through, or a model that does not run
    on text alone; nothing is asked of a model that reads nothing else."""
    elsewhere = outside(model)
    if not elsewhere:
        return
    sites = [*bound.targets, *(cut.site for group in bound for cut in group.cuts)]
    sites += [block for group in bound for block in group.blocks]
    if site := next((site for site in sites if is_in(site, elsewhere)), None):
        raise ConfigError(
            f"{source}: {site} is outside of the language model of {type(model).__name__} "
            f"({language_model(model)}), and what is there stays as it is; leave it out"
        )
    given = inspect.signature(model.forward).parameters.values()
    more = [each.name for each in given if each.default is each.empty and each.kind in _GIVEN]
    if more := [name for name in more if name != "input_ids"]:
        raise ConfigError(
            f"{type(model).__name__} does not run on text alone: it wants {', '.join(more)}, too"
        )


_GIVEN = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
"""Kinds of arguments that have to be given where they have no default."""
