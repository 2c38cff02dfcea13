"""Settings of `elastic export`: what is written, merged into it and measured.

As in `config`, a bad value is refused in `__post_init__`, and nothing heavy is imported.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

from elastic.config.compensation import CompensationConfig
from elastic.config.latency import GRAPHS, Graph, RoundedTo, TimingConfig
from elastic.config.numbers import require_numbers
from elastic.config.recovery import RecoveryConfig
from elastic.errors import require
from elastic.plain import is_name


@dataclass(frozen=True, kw_only=True)
class MergeAdapterConfig:
    """Another adapter on the same base model."""

    path: str
    """A run of ours, a PEFT adapter's directory, or the hub name of either (owner/name)."""
    weight: float = 1.0
    """What its update is multiplied by."""


_VOTES = ("ties", "dare_ties")
_PRUNES = ("magnitude_prune", "dare_linear", *_VOTES)


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    """Other adapters to fold in with the sub-adapter, permuted and cut to its widths."""

    adapters: list[MergeAdapterConfig] = field(default_factory=list)
    weight: float = 1.0
    """The sub-adapter's own weight."""
    strategy: Literal["linear", "magnitude_prune", "ties", "dare_linear", "dare_ties"] = "linear"
    """How updates combine (PEFT's functions of these names): weighted sum; the same of the largest
    entries; with a vote on signs (TIES, arXiv 2306.01708); of random entries (DARE, arXiv
    2311.03099)."""
    density: float = 0.5
    """Share of entries kept, by all but linear."""
    majority_sign_method: Literal["total", "frequency"] = "total"
    """ties, dare_ties: signs vote with their size or one each."""

    def __post_init__(self) -> None:
        require(0 < self.density <= 1, f"merge.density is {self.density}; choose from (0, 1]")
        for name in ("weight", "strategy", "density", "majority_sign_method"):
            value = getattr(self, name)
            require(
                bool(self.adapters) or value == getattr(MergeConfig, name),
                f"merge.{name} is {value}, but there is nothing to merge; name it with "
                "merge.adapters",
            )
        for name, needed in (("density", _PRUNES), ("majority_sign_method", _VOTES)):
            value = getattr(self, name)
            require(
                self.strategy in needed or value == getattr(MergeConfig, name),
                f"merge.{name} is {value}, which the strategy {self.strategy} does not use; leave "
                f"it out, or choose merge.strategy from {', '.join(needed)}",
            )


@dataclass(frozen=True, kw_only=True)
class HfConfig:
    """Folders that load without code of ours, where layers differ in size."""

    padded: bool = False
    """Fill smaller layers up with zeros to the largest: the family's own class and the same
    outputs, but neither smaller nor faster than the largest layer makes it."""
    max_shard_size: str = "50GB"
    """The largest file of weights."""
    uniform: bool = False
    """Write the sub-adapter of one size for all layers that is nearest in operations instead."""
    text_only: bool = False
    """Of a model that reads pictures, too, write its language model alone, of a class of its own.
    Graphs and GGUF have that alone anyway."""

    def __post_init__(self) -> None:
        require(
            not (self.padded and self.uniform),
            "hf.padded and hf.uniform: one size for all layers needs no padding; choose one",
        )


@dataclass(frozen=True, kw_only=True)
class SlicesConfig:
    """One folder for every size."""

    base: Literal["copy", "reference"] = "copy"
    """reference: the folder has no weights of the base model, but where they are, their digest and
    the order of their channels, for a folder of megabytes that this package alone loads."""
    tables: list[str] = field(default_factory=list)
    """Latency tables that `elastic latency RUN --save` wrote on other devices or in other runtimes:
    the folder says what every size takes there, too."""


Format = Literal["hf", "peft", Graph, "gguf", "nemotron_nas", "elastic"]
_USUAL: tuple[Format, ...] = ("hf", "peft", "onnx", "openvino")


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Slices one sub-adapter out, merges it and writes it for a runtime; each written model is
    loaded again and compared with the supernet."""

    run: str = "runs/default"
    """The run directory of a trained super-adapter."""
    sub_adapter: str = "best"
    """best (of the search), maximal, heuristic, minimal, a name from the front, or a JSON file."""
    name: str | None = None
    """Directory below RUN/export; unset is the sub-adapter's name."""
    push_to_hub: str | None = None
    """OWNER/NAME on the Hugging Face hub, made if it is not there: what is written goes there, too,
    with a card."""
    push_private: bool | None = None
    """Whether a repository that is made is private; unset, as its owner has set it: mostly not."""
    formats: list[Format] = field(default_factory=lambda: list(_USUAL))
    """Only when asked for: gguf (extra `gguf`), for llama.cpp; nemotron_nas, for what knows
    NVIDIA's Puzzle models (vLLM, mlx-lm); elastic, one folder for all of the front
    (`elastic.load`)."""
    compress: list[Literal[RoundedTo, "int4_awq", "int4_scale", "int4_gptq", "nf4"]] = field(
        default_factory=list
    )
    """Write onnx and openvino with weights of so few bits as well, by NNCF (extra `compress`);
    unset, as the search chose for this sub-adapter."""
    compress_examples: int = 64
    """Training examples that int4_awq, int4_scale and int4_gptq look at."""
    logits: Literal["last", "all"] = "last"
    """onnx, openvino: positions that get logits; last makes prefill cheaper, all allows scoring."""
    compensation: CompensationConfig = field(default_factory=CompensationConfig)
    """Of a sub-adapter that the search did not choose; what it chose is kept, or turned off by
    degrees of 0 alone."""
    recover: RecoveryConfig = field(default_factory=RecoveryConfig)
    """The sub-adapter is trained on so before it is written, if held-out examples say that it is
    better then; what the search recovered is written as it is."""
    merge: MergeConfig = field(default_factory=MergeConfig)
    hf: HfConfig = field(default_factory=HfConfig)
    slices: SlicesConfig = field(default_factory=SlicesConfig)
    timing: TimingConfig = field(default_factory=TimingConfig)
    prove: bool = True
    """false only writes, tensor by tensor, what is larger than memory: hf and elastic, which are
    neither loaded again nor compared nor timed."""
    accuracy: bool = True
    """Score the compact model on the test split, unless the search already has; it and the full one
    where hf or peft is written at the precision of both."""
    runtime_examples: int = 100
    """Score every written model in its own runtime, too, and the full one beside it, on at most so
    many of them: one at a time, so this takes a while. 0 does not."""
    weigh: bool = True
    """Load every written model, and the full one, once more in a process of its own: how long that
    takes and how much memory."""
    batch_tokens: int = 2048
    """Padded tokens per evaluation batch; the score does not depend on it."""
    seed: int = 0
    """Of what is drawn: a random sub-adapter, the entries that DARE keeps, prompts to time."""

    def __post_init__(self) -> None:
        require_numbers(self)
        require(self.runtime_examples >= 0, f"runtime_examples is {self.runtime_examples}")
        require(
            self.name is None or is_name(self.name),
            f"name {self.name!r}: a directory of this name is made below RUN/export; give one "
            "without slashes and line breaks that does not begin with a dot",
        )
        require(
            self.push_private is None or self.push_to_hub is not None,
            "push_private is about the repository that push_to_hub names; give that",
        )
        if self.push_to_hub is not None:
            _require_repository(self.push_to_hub)
        plain = set(self.formats) <= {"hf", "elastic"} and not (
            self.merge.adapters or self.hf.padded or self.hf.uniform or self.hf.text_only
        )
        require(
            self.prove or plain,
            "prove false writes a sub-adapter as it is, as hf or elastic: give --formats hf, and "
            "nothing to merge, to pad or to make uniform, nor hf.text_only",
        )
        require(
            self.slices == SlicesConfig() or "elastic" in self.formats,
            "slices: settings of one folder for every size; add elastic to formats",
        )
        require(
            not (self.recover.steps and self.hf.uniform),
            "recover and hf.uniform: another sub-adapter is written than the one trained on; train "
            "on the uniform one with --sub_adapter, or leave one of them out",
        )
        require(
            self.prove or not self.recover.steps,
            "recover trains the model in memory, and prove false is for those that do not fit "
            "there; leave one of them out",
        )
        require(
            re.fullmatch(r"[1-9]\d*[KMGT]B", self.hf.max_shard_size) is not None,
            f"hf.max_shard_size {self.hf.max_shard_size!r}: give a size such as 5GB",
        )
        require(self.compress_examples >= 1, f"compress_examples is {self.compress_examples}")
        require(
            not self.compress or self.has_graphs,
            f"compress {', '.join(self.compress)}: it is graphs whose weights are compressed; add "
            f"{' or '.join(GRAPHS)} to formats",
        )
        require(bool(self.formats), f"formats is empty; choose from {', '.join(_USUAL)}")
        require(
            not self.merge.adapters or not set(self.formats) <= {"peft", "elastic"},
            f"merge.adapters and formats {', '.join(self.formats)}: what is merged has neither a "
            "low rank nor other sizes; add hf, or another format",
        )
        require(
            self.timing.runtime == "torch" and self.timing.merged,
            "timing.runtime and timing.merged: every written format is timed in its own runtime; "
            "choose with formats",
        )

    @property
    def has_graphs(self) -> bool:
        """Whether onnx or openvino is written."""
        return bool(set(self.formats) & set(GRAPHS))

    @property
    def kinds(self) -> list[str]:
        """What is written, in order: the formats, each followed by itself compressed."""
        found = []
        for kind in dict.fromkeys(self.formats):
            modes = self.compress if kind in GRAPHS else []
            found += [kind, *(f"{kind}-{mode}" for mode in dict.fromkeys(modes))]
        return found


def _require_repository(name: str) -> None:
    """ConfigError unless a repository of the hub can have this name, of an owner."""
    from huggingface_hub.errors import HFValidationError  # not quick to import
    from huggingface_hub.utils import validate_repo_id

    reason = "" if name.count("/") == 1 else "one slash is missing, or one too many"
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        reason = str(error)
    require(not reason, f"push_to_hub {name!r}: {reason}; give OWNER/NAME")
