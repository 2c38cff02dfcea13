"""Which auto class of transformers loads a model, by the name of the model's own class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from elastic.errors import ExportError
from elastic.models import wrappers
from elastic.models.wrappers import OWN

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AUTO = {
    "ForCausalLM": "AutoModelForCausalLM",
    "LMHeadModel": "AutoModelForCausalLM",
    "ForConditionalGeneration": "AutoModelForSeq2SeqLM",
    "ForSequenceClassification": "AutoModelForSequenceClassification",
    "ForMaskedLM": "AutoModelForMaskedLM",
}
"""Of classes that transformers does not have, by how their names end."""


def auto_of(architecture: str) -> str:
    """The name of transformers' auto class that loads a model of the class of this name;
    ExportError if there is none."""
    if whole := wrappers.auto_of(architecture):
        return whole
    name = architecture.removeprefix(OWN)
    for auto, classes in known_classes().items():
        if name in classes.values():
            return auto
    for ending, auto in AUTO.items():  # of classes from elsewhere
        if name.endswith(ending):
            return auto
    raise ExportError(f"hf: which auto class loads {architecture} is not known")


def has_auto(model: PreTrainedModel) -> bool:
    """Whether an auto class loads models of this class."""
    try:
        return bool(auto_of(type(model).__name__))
    except ExportError:
        return False


def known_classes() -> dict[str, Mapping[str, str]]:
    """By auto class, the name of the class for every type of model."""
    from transformers.models.auto import modeling_auto as names

    return {
        "AutoModelForCausalLM": names.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForSeq2SeqLM": names.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "AutoModelForSequenceClassification": names.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "AutoModelForMaskedLM": names.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    }
