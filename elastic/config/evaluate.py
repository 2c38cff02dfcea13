"""Settings of `elastic evaluate`: what is asked, and how.

As in `config`, a bad value is refused in `__post_init__`, and nothing heavy is imported.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from elastic.config.compensation import CompensationConfig
from elastic.config.latency import Graph
from elastic.config.model import Dtype
from elastic.config.numbers import require_numbers
from elastic.errors import require

PARTS = {
    "tasks": ("data", "protocol", "beams"),
    "harness": ("harness_tasks", "chat", "run_code", "exported"),
    "text": ("window",),
}
"""Settings that say how what one other setting names is asked."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Scores one sub-adapter, active in the supernet, on one split, on published test sets, on
    tasks of lm-evaluation-harness or on a text."""

    run: str = "runs/default"
    """The run directory of a trained super-adapter."""
    sub_adapter: str = "maximal"
    """best (of the search), maximal, heuristic, minimal, uniform-FRACTION, a name of the front,
    or a JSON file."""
    compensation: CompensationConfig = field(default_factory=CompensationConfig)
    """Of a sub-adapter that the search did not choose; what it chose is kept, or turned off by
    degrees of 0 alone."""
    split: Literal["validation", "test"] = "test"
    """Of the run's own data."""
    tasks: list[str] = field(default_factory=list)
    """Published sets instead of the run's own: math, commonsense, or gsm8k, aqua, mawps, svamp,
    boolq, piqa, social_i_qa, hellaswag, winogrande, arc_easy, arc_challenge, openbookqa."""
    data: str = "data"
    """The folder of those sets: NAME.test.jsonl, or LLM-Adapters' NAME/test.json."""
    protocol: Literal["published", "likelihood"] = "published"
    """published: generate with beams and look for the answer in the text. likelihood: score the
    options of multiple choice, which takes one pass; other sets are generated greedily."""
    beams: int = 4
    """Of published sets that are answered by text; 1 is greedy."""
    examples: int | None = None
    """At most so many of each set, or of the run's own split, drawn from all of it; of harness
    tasks the first ones."""
    batch: int = 8
    """Prompts that are answered together; the answers do not depend on it."""
    batch_tokens: int = 2048
    """Padded tokens per evaluation batch; the score does not depend on it."""
    dtype: Dtype | None = None
    """Type to compute in; unset, the one of the training."""
    harness: list[str] = field(default_factory=list)
    """Tasks of lm-evaluation-harness (extra `eval`), such as gsm8k, mmlu, bbh, humaneval, or of the
    methods' papers: sorsa_gsm8k, sorsa_math, sorsa_humaneval, soslora_gsm8k, soslora_math,
    prolora_mmlu, prolora_gsm, prolora_bbh, prolora_tydiqa, prolora_humaneval. Most fetch their data
    from the hub."""
    harness_tasks: str | None = None
    """A folder with tasks of your own for it. Such tasks are programs (templates, `!function`), so
    they need `run_code`."""
    chat: bool = False
    """harness: put prompts through the tokenizer's chat template."""
    run_code: bool = False
    """harness: let tasks run code on this machine, their own and what the model writes. Programs of
    the model run in processes with limits on time and memory, but with your rights."""
    exported: Graph | None = None
    """harness: ask what `elastic export` wrote under the sub-adapter's name for this runtime."""
    text: str | None = None
    """A text file: perplexity on it."""
    window: int = 512
    """Tokens that are predicted from one start of the text."""

    def __post_init__(self) -> None:
        require_numbers(self)
        for name in ("beams", "batch", "batch_tokens", "window"):
            require(getattr(self, name) >= 1, f"{name} is {getattr(self, name)}; at least 1")
        require(self.examples is None or self.examples >= 1, f"examples is {self.examples}")
        asked = [name for name in PARTS if getattr(self, name)]
        require(len(asked) <= 1, f"{' and '.join(asked)}: give one of them")
        require(not (self.text and self.examples), "examples: a text is read as a whole")
        require(
            not asked or self.split == EvaluateConfig.split,
            f"split is of the run's own data; leave it out ({self.split}), or {asked}",
        )
        require(
            self.protocol == "published" or self.beams == EvaluateConfig.beams,
            f"beams are of the published protocol; leave them out ({self.beams})",
        )
        for owner, parts in PARTS.items():
            for name in parts:
                value = getattr(self, name)
                require(
                    bool(getattr(self, owner)) or value == getattr(EvaluateConfig, name),
                    f"{name} goes with {owner}; leave {name} out ({value}), or give {owner}, too",
                )
        require(
            self.harness_tasks is None or self.run_code,
            f"harness_tasks {self.harness_tasks}: templates and functions of such a folder run code"
            " on this machine; read them, then give run_code, too",
        )
        require(
            not (self.exported and self.chat),
            "exported and chat: exported models are asked without a chat template",
        )
        require(
            not (self.exported and self.dtype),
            f"dtype {self.dtype}: exported models compute in their own; leave out one",
        )
