"""A compact model that comes back, as a base to train again: of its family, as when it was cut.

Where layers have sizes of their own, what was written is of a small class that rebuilds them
(`elastic/formats/hf.py`). Once loaded it has done its work: the family's own class computes the
same with these layers, and everything here knows families.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PREFIX = "elastic_"
"""Before the family's type, in the type of what is written."""
SIZES = ("linear_sizes", "attention_sizes")
"""What its config says beside the family's."""


def of_family_(config: PretrainedConfig) -> PretrainedConfig:
    """A small class's config as its family's, in place: modules share the object."""
    if config.model_type.startswith(PREFIX):
        config.__class__ = _family(type(config))
        for name in (*SIZES, "auto_map", "model_type"):
            config.__dict__.pop(name, None)
    return config


def as_cut_(model: PreTrainedModel) -> PreTrainedModel:
    """A model of a small class as one of its family's, in place."""
    if model.config.model_type.startswith(PREFIX):
        model.__class__ = _family(type(model))
        for module in model.modules():  # encoders and decoders have copies of their own
            if hasattr(module, "config"):
                of_family_(module.config)
        model.config.architectures = [type(model).__name__]
    return model


def _family(kind: type) -> type:
    """The class of transformers that a small class is of; it derives from it, more than once."""
    return next(each for each in kind.__mro__ if each.__module__.startswith("transformers."))
