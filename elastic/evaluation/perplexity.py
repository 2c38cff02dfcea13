"""Perplexity on a text of the user's own."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from elastic.config import EvaluateConfig
from elastic.console import say, track
from elastic.errors import ConfigError, DataError, DataMissing
from elastic.models import loading
from elastic.run import Run
from elastic.supernet.held_out import compensated
from elastic.supernet.store import load_run

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean negative log-likelihood of a token, each window read from its own start."""

    name: str
    file: str
    losses: Sequence[float]
    """Nats per token of every window; all windows have as many tokens but the last."""
    counts: Sequence[int]

    @property
    def tokens(self) -> int:
        return sum(self.counts)

    @property
    def value(self) -> float:
        total = sum(loss * n for loss, n in zip(self.losses, self.counts, strict=True))
        return math.exp(total / self.tokens)

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 %, by the spread over windows, which tokens of one text are not independent within;
        None of a single window."""
        if len(self.losses) < 2:
            return None
        half = 1.96 * statistics.stdev(self.losses) / math.sqrt(len(self.losses))
        return self.value * math.exp(-half), self.value * math.exp(half)

    def show(self) -> None:
        sure = "" if self.interval is None else " [{:.4g}, {:.4g}]".format(*self.interval)
        print(f"{self.name} on {self.file}: perplexity {self.value:.4g}{sure} of {self.tokens} "
              f"tokens in {len(self.losses)} windows")  # fmt: skip
        found = {"sub_adapter": self.name, "perplexity": self.value, "interval": self.interval}
        print(json.dumps({**found, "tokens": self.tokens, "windows": len(self.losses)}))


def perplexity_of(config: EvaluateConfig) -> Perplexity:
    """`elastic evaluate RUN --text FILE`.

    ConfigError for a model that continues no texts or a window longer than it reads, DataMissing or
    DataError for a file that cannot be read.
    """
    assert config.text is not None
    run = Run(config.run)
    trained = run.config()
    architecture = loading.architecture_of(trained.model)
    if architecture.is_encoder_decoder:
        raise ConfigError(
            f"text: {run.path} has an encoder-decoder model, which continues no texts"
        )
    positions = getattr(architecture, "max_position_embeddings", None) or config.window
    if config.window > positions:
        raise ConfigError(f"window {config.window}: the model has {positions} positions")
    try:
        text = Path(config.text).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError):
        raise DataMissing(f"text {config.text}: no such file") from None
    except UnicodeDecodeError as error:
        raise DataError(f"text {config.text}: not UTF-8 text: {error.reason}") from None
    chosen = run.chosen(config.sub_adapter)
    _, base, net = load_run(run, config.dtype, chosen)
    ids = base.tokenizer(text, verbose=False)["input_ids"]
    start = base.tokenizer.bos_token_id
    if ids and ids[0] == start:
        ids = ids[1:]
    else:
        start = None
    if len(ids) < 2:
        raise DataError(f"text {config.text}: {len(ids)} tokens; at least 2 are needed")
    name, sub = chosen.name, chosen.at(net.space, trained.seed)
    if net.space.cuts_vocabulary(sub):
        say(f"{name} does without some tokens; of a text that has them its perplexity would be "
            "infinite, so all are computed here")  # fmt: skip
        sub = net.space.with_whole_vocabulary(sub)
    with compensated(run, net, base.tokenizer, chosen, sub, config.compensation) as (model, _):
        losses, counts = window_losses(model, ids, config.window, start, label=name)
    return Perplexity(name, config.text, losses, counts)


@torch.inference_mode()
def window_losses(
    model: PreTrainedModel,
    ids: Sequence[int],
    window: int,
    start: int | None = None,
    label: str = "reading",
) -> tuple[list[float], list[int]]:
    """Nats per predicted token, and how many, of windows of `window` predicted tokens. A window
    begins with the token `start`, or without one with the last token of the window before."""
    losses, counts = [], []
    first = 0 if start is not None else 1
    for at in track(range(first, len(ids), window), label):
        before = [ids[at - 1] if start is None else start]
        part = torch.tensor([before + list(ids[at : at + window])], device=model.device)
        logits = model(input_ids=part[:, :-1], use_cache=False).logits[0].float()
        losses.append(float(F.cross_entropy(logits, part[0, 1:])))
        counts.append(part.shape[1] - 1)
    return losses, counts
