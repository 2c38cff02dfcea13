"""What passes through a model on calibration batches, real tokens alone: what padding computes is
noise, and how much there is of it depends on the batch."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elastic.data.answers import padded_behind, padding_is_seen
from elastic.data.collating import IGNORED
from elastic.errors import ConfigError
from elastic.models.kinds import Kind, kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Watching:
    """Runs batches through a model and tells, inside hooks, real tokens from padding."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.kind = model, kind_of(model)
        self._prompt: Tensor | None = None
        self._answer: Tensor | None = None

    def real(self, module: str) -> Tensor | None:
        """Which tokens are, (batch * length,) as the module of this name has them in the last
        batch; None: all."""
        in_decoder = self.kind is Kind.ENCODER_DECODER and "decoder" in module.split(".")
        return self._answer if in_decoder else self._prompt

    def tokens(self, module: str, x: Tensor) -> Tensor:
        """(real tokens, features) of what enters or leaves the module of this name. ConfigError if
        that is no row for every token."""
        real = self.real(module)
        x = x.flatten(0, -2)
        if real is not None and len(x) != len(real):
            raise ConfigError(
                f"{module} gets {len(x)} rows for a batch of {len(real)} tokens, as an expert does "
                "that some tokens are sent to. Which ones cannot be told, so its channels have no "
                "order: leave it out of what is cut"
            )
        return x if real is None else x[real]

    def __call__(self, batch: dict[str, Tensor]) -> None:
        """One forward pass on keyword arguments of the model."""
        behind = "position_ids" in batch and padding_is_seen(self.model)
        if behind:
            batch = padded_behind(batch)
        mask = batch.get("attention_mask")
        self._prompt = None if mask is None else mask.flatten().bool()
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        if behind:  # no token sees what stands behind it
            inputs["attention_mask"] = torch.ones_like(batch["attention_mask"])
        if self.kind is Kind.ENCODER_DECODER:
            self._answer = batch["labels"].flatten() != IGNORED
            self.model(**batch, use_cache=False)
        elif self.kind is Kind.CLASSIFIER:
            self.model(**inputs)
        else:
            self.model(**inputs, logits_to_keep=1, use_cache=False)

    @contextlib.contextmanager
    def inputs(self, tell: Mapping[str, Callable[[Tensor], None]]) -> Iterator[None]:
        """Inside the block, each function is told what enters the module of its name, (real tokens,
        features)."""

        def watch(name: str) -> torch.utils.hooks.RemovableHandle:
            return self.model.get_submodule(name).register_forward_pre_hook(
                lambda _, given: tell[name](self.tokens(name, given[0]))
            )

        handles = [watch(name) for name in tell]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
