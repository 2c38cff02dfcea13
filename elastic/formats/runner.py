"""One way to drive a model in any runtime: a prompt in, then token by token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from elastic.errors import ModelError
from elastic.models import compat
from elastic.models.kinds import Kind, kind_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Runner(Protocol):
    """A deployed model with its KV cache; a classifier only prefills."""

    own_threads: bool
    """Whether it computes on threads that are not the process's: they may go on spinning for work
    while another runner's turn has begun."""

    def prefill(self, input_ids: np.ndarray, types: np.ndarray | None = None) -> np.ndarray:
        """(batch, prompt) int64 -> logits of the first token of an answer (batch, vocab), or of the
        classes (batch, classes); forgets the past. `types`, of the same shape, tell the sentences
        of a pair apart, to classifiers that do so; all are of the first unless given."""

    def decode(self, input_ids: np.ndarray) -> np.ndarray:
        """(batch, 1) int64 -> logits (batch, vocab), continuing from what came before."""


class TorchRunner:
    """A transformers model, called as `generate` calls it: only the last position has logits, and
    a model that caches nothing (GPT-1's) reads everything again for every token.

    Logits come back as float32 or wider; fetching them waits for the device.
    """

    own_threads = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._cache: Any = None
        self._read: torch.Tensor | None = None
        """All tokens so far, where there is no cache."""

    def prefill(self, input_ids: np.ndarray, types: np.ndarray | None = None) -> np.ndarray:
        self._cache = self._read = None
        compat.forget_(self.model)
        return self.decode(input_ids)

    def decode(self, input_ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            tokens = self._tensor(input_ids)
            if self._read is not None:
                tokens = torch.cat([self._read, tokens], dim=1)
            logits = self._fetch(self._logits(tokens))
            self._read = tokens if self._cache is None else None
            return logits

    def _tensor(self, input_ids: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(input_ids)).to(self.model.device)

    def _logits(self, tokens: torch.Tensor) -> torch.Tensor:
        """ModelError for whatever the model's code raises, such as of a cache that it cannot go on
        from."""
        try:
            return self._forward(tokens)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(
                f"{type(self.model).__name__} does not run token by token: "
                f"{type(error).__name__}: {reason}"
            ) from error

    def _forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self._called(input_ids=input_ids, logits_to_keep=1)

    def _called(self, **inputs: Any) -> torch.Tensor:
        output = self.model(**inputs, use_cache=True, **compat.given(self.model, self._cache))
        self._cache = compat.cache_of(output)
        return output.logits[:, -1]

    def _fetch(self, logits: torch.Tensor) -> np.ndarray:
        return logits.to(torch.promote_types(logits.dtype, torch.float32)).cpu().numpy()


class TorchClassifier(TorchRunner):
    """A transformers model that answers with a class."""

    def prefill(self, input_ids: np.ndarray, types: np.ndarray | None = None) -> np.ndarray:
        given = {} if types is None else {"token_type_ids": self._tensor(types)}
        with torch.inference_mode():
            return self._fetch(self.model(input_ids=self._tensor(input_ids), **given).logits)


class TorchRecurrent(TorchRunner):
    """A transformers model that carries a state."""

    def _forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        output = self.model(input_ids, state=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = output.state
        return output.logits[:, -1]


class TorchEncoderDecoder(TorchRunner):
    """A transformers model that encodes the prompt and decodes from the start of an answer."""

    def prefill(self, input_ids: np.ndarray, types: np.ndarray | None = None) -> np.ndarray:
        with torch.inference_mode():
            self._encoded = self.model.get_encoder()(input_ids=self._tensor(input_ids))
        start = self.model.config.decoder_start_token_id
        return super().prefill(np.full((len(input_ids), 1), start, np.int64))

    def _forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self._called(encoder_outputs=self._encoded, decoder_input_ids=input_ids)


RUNNERS = {Kind.DECODER: TorchRunner, Kind.RECURRENT: TorchRecurrent,
           Kind.ENCODER_DECODER: TorchEncoderDecoder, Kind.CLASSIFIER: TorchClassifier}  # fmt: skip


def runner_of(model: PreTrainedModel) -> TorchRunner:
    """The one for this kind of model."""
    return RUNNERS[kind_of(model)](model)
