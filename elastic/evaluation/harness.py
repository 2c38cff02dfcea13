"""lm-evaluation-harness on a sub-adapter: active in the supernet, or as it was exported."""

from __future__ import annotations

import contextlib
import difflib
import json
import math
import os
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import torch

from elastic.config import EvaluateConfig
from elastic.console import busy, say, track
from elastic.errors import ConfigError, DataError, ElasticError, MissingExtra, RunError
from elastic.evaluation.in_runtime import continued, likelihood
from elastic.files import read_json, shipped_folders, tag, write_json
from elastic.models.kinds import Kind, kind_of
from elastic.provenance import provenance
from elastic.run import Run
from elastic.supernet.held_out import compensated
from elastic.supernet.store import load_run

if TYPE_CHECKING:
    from lm_eval.api.group import Group
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from elastic.formats.runner import Runner


CODE_EVAL = "HF_ALLOW_CODE_EVAL"
ENDLESS = 1 << 14
"""Tokens of prompt and answer for models that have a state in place of positions."""


@dataclass(frozen=True)
class HarnessReport:
    """What the harness found, task by task and metric by metric."""

    name: str
    results: Mapping[str, Mapping[str, Any]]
    counts: Mapping[str, int]
    file: Path
    unsayable: int
    """Likelihoods that are 0: of texts with tokens that a cut head does without."""

    def show(self) -> None:
        for task, metrics in self.results.items():
            n = f" of {self.counts[task]}" if task in self.counts else ""
            for metric, found in metrics.items():
                low, high = found["interval"] or (None, None)
                sure = "" if low is None else f" [{low:.4g}, {high:.4g}]"
                print(f"{self.name} on {task}: {metric} {found['value']:.4g}{sure}{n}")
        print(self.file)
        if self.unsayable:
            print(f"{self.unsayable} likelihoods are of texts with tokens that its head does "
                  "without. Where that is so of all options, the harness takes the first: there, "
                  "accuracies mean nothing")  # fmt: skip
        about = {"sub_adapter": self.name, "unsayable": self.unsayable}
        print(json.dumps({**about, "harness": _plain(self.results)}))


def task_manager(config: EvaluateConfig) -> TaskManager:
    """The harness's tasks, those of the papers (configs/harness) and the user's own; ConfigError
    names one that is none of them, or that runs code without leave, MissingExtra a harness that is
    not installed."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtra("lm_eval", "eval", "harness") from error

    folders = [str(folder) for folder in shipped_folders("configs/harness")]
    folders += filter(None, [config.harness_tasks])
    known = TaskManager(include_path=folders, include_defaults=False)
    if not set(config.harness) <= set(known.all_tasks):
        say("Reading the list of the harness's tasks")  # many thousand files
        with busy("reading the list"):
            known = TaskManager(include_path=folders)
    for name in config.harness:
        if name not in known.all_tasks:
            near = difflib.get_close_matches(name, known.all_tasks, 3, 0.5)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise ConfigError(f"harness: unknown task {name!r}{hint}")
    unsafe = () if config.run_code else _running_code(known, config.harness)
    for name in unsafe:
        raise ConfigError(
            f"harness: task {name!r} runs programs that the model writes on this machine, with "
            "your rights; give run_code, too, best in a container"
        )
    return known


def _running_code(tasks: TaskManager, names: Iterable[Any]) -> Iterator[str]:
    """Which of these, and of what they stand for, say that they run what a model writes."""
    for named in names:
        name = named if isinstance(named, str) else named.get("task", named.get("group"))
        entry = tasks.task_index.get(name)
        settings = (entry.cfg if entry else named) or {}
        if settings.get("unsafe_code"):
            yield name
        members = settings.get("task") if "group" in settings else None
        if entry and not entry.cfg:  # a tag
            members = sorted(entry.tags)
        yield from _running_code(tasks, members if isinstance(members, list) else ())


def run_harness(config: EvaluateConfig) -> HarnessReport:
    """`elastic evaluate RUN --harness TASKS`: everything it says goes into one file."""
    run = Run(config.run)
    chosen = None if config.exported else run.chosen(config.sub_adapter)
    manager = task_manager(config)
    tasks, file = loaded(config, manager), _file(run, config)
    if chosen is None:
        name, sub, model = _exported(run, config)
        device = "cpu"
        found = _evaluate(model, config, tasks, manager)
    else:
        trained, base, net = load_run(run, config.dtype, chosen)
        name, point = chosen.name, chosen.at(net.space, trained.seed)
        sub, device = point.as_dict(), str(base.model.device)
        made_up = compensated(run, net, base.tokenizer, chosen, point, config.compensation)
        with made_up as (active, _):
            model = in_memory(active, base.tokenizer, config.batch)
            found = _evaluate(model, config, tasks, manager)
    results = {task: _metrics(values) for task, values in found["results"].items()}
    counts = {task: each["effective"] for task, each in found["n-samples"].items()}
    unsayable = _unsayable(found["samples"])
    file.parent.mkdir(exist_ok=True)
    write_json(file, {
        "name": name, "sub_adapter": sub, "exported": config.exported, "chat": config.chat,
        "results": _plain(results), "n": counts, "unsayable": unsayable,
        "task_versions": found["versions"],
        "task_configs": _plain(found["configs"]), "samples": _plain(found["samples"]),
        **provenance(device), "lm_eval": version("lm_eval"),
    })  # fmt: skip
    return HarnessReport(name, results, counts, file, unsayable)


def _file(run: Run, config: EvaluateConfig) -> Path:
    """Of this sub-adapter, these tasks and these settings."""
    name = Path(config.sub_adapter).name.removesuffix(".json")
    tasks = "-".join(config.harness)
    if len(tasks) > 100:  # names of files end at 255 bytes
        tasks = f"{tasks[:80]}-{tag(tasks)}"
    parts = [name, config.exported, "harness", tasks, "chat" if config.chat else None, config.dtype]
    some = f"-first-{config.examples}" if config.examples else ""
    return run.path / "evaluate" / f"{'-'.join(filter(None, parts))}{some}.json"


def loaded(config: EvaluateConfig, tasks: TaskManager) -> list[Task | Group]:
    """The tasks with their data, which may be long in coming, before any weights are; DataError for
    data that cannot be had."""
    for seed, value in ((random.seed, 0), (numpy.random.seed, 1234), (torch.manual_seed, 1234)):
        seed(value)  # as `simple_evaluate` does before: some tasks shuffle their choices
    with _named(), _code_allowed(config.run_code), busy("reading the tasks' data", own_bars=True):
        known = tasks.load(config.harness)
    groups, inside = known.get("groups", {}), known.get("group_map", {}).values()
    members = {name for names in inside for name in names}
    every = {**groups, **known["tasks"]}
    return [one for name, one in every.items() if name not in members]


def in_memory(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch: int) -> LM:
    """A model of transformers as the harness sees it."""
    from lm_eval.models.huggingface import HFLM

    if kind_of(model) is not Kind.RECURRENT:
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
    # transformers mixes the states of a batch that it decodes; a state has no longest text.
    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=ENDLESS)


def _evaluate(
    model: LM, config: EvaluateConfig, tasks: Sequence[Task | Group], manager: TaskManager
) -> dict[str, Any]:
    import lm_eval

    running = busy("answering the harness", own_bars=True)
    with _named(), _code_allowed(config.run_code), running:
        return lm_eval.simple_evaluate(
            model=model,
            tasks=list(tasks),
            limit=config.examples,
            task_manager=manager,
            apply_chat_template=config.chat,
            confirm_run_unsafe_code=config.run_code,
        )


@contextlib.contextmanager
def _named() -> Iterator[None]:
    """DataError in one line for what the harness raises: data and packages that are not there,
    answers that a model has no room for."""
    try:
        yield
    except ElasticError:
        raise
    except (AssertionError, ImportError, KeyError, OSError, ValueError) as error:
        if not str(error):
            raise
        raise DataError(f"harness: {' '.join(str(error).split())[:400]}") from error


@contextlib.contextmanager
def _code_allowed(allowed: bool) -> Iterator[None]:
    """Tells the `code_eval` of Hugging Face's evaluate, with which the harness's own tasks run
    code, while the block lasts."""
    before = os.environ.get(CODE_EVAL)
    if allowed:
        os.environ[CODE_EVAL] = "1"
    try:
        yield
    finally:
        if allowed:
            os.environ.pop(CODE_EVAL)
            if before is not None:
                os.environ[CODE_EVAL] = before


def _metrics(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By metric: the value, and its 95 % interval where the harness knows a standard error."""
    found = {}
    for key, value in values.items():
        metric, comma, kind = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{kind}")
        half = 1.96 * error if isinstance(error, int | float) else None
        interval = None if half is None else [value - half, value + half]
        name = metric if kind == "none" else f"{metric} ({kind})"
        found[name] = {"value": float(value), "interval": interval}
    return found


def _unsayable(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> int:
    """How many likelihoods, of all that were asked for these examples, by task, are 0."""
    asked = (each for rows in samples.values() for row in rows for each in row["resps"])
    said = (one for each in asked for one in each)  # a text, or its likelihood, perhaps in a pair
    return sum((one[0] if isinstance(one, tuple) else one) == -math.inf for one in said)


def _plain(value: Any) -> Any:
    """As JSON can say it; a function by its name, and nothing for what is no finite number, such
    as the likelihood of a token that a head does not know."""
    text = json.dumps(value, default=lambda other: getattr(other, "__name__", None) or str(other))
    return json.loads(text, parse_constant=lambda _: None)


def _exported(run: Run, config: EvaluateConfig) -> tuple[str, dict[str, int], LM]:
    """Name, sizes and the model that RUN/export/NAME holds for this runtime."""
    from transformers import AutoTokenizer, GenerationConfig

    from elastic.formats.graphs import MODULES

    assert config.exported is not None
    folder = run.path / "export" / config.sub_adapter
    if not (folder / "report.json").is_file():
        exports = folder.parent.iterdir() if folder.parent.is_dir() else ()
        names = ", ".join(sorted(path.name for path in exports)) or "none"
        raise RunError(
            f"{folder}: nothing was exported there; exported were: {names}. Run: elastic export "
            f"{run.path} --sub_adapter {config.sub_adapter}"
        )
    report = read_json(folder / "report.json")
    written = folder / config.exported
    if not written.is_dir():
        raise RunError(f"{written} does not exist; export with --formats {config.exported}")
    tokenizer = AutoTokenizer.from_pretrained(written)
    ends = tokenizer.eos_token_id
    if (written / "generation_config.json").is_file():
        ends = GenerationConfig.from_pretrained(written).eos_token_id or ends
    runner = MODULES[config.exported].open_runner(written)
    ends = ends if isinstance(ends, list) else [ends]
    return report["name"], report["sub_adapter"], runner_model(runner, tokenizer, ends)


def runner_model(
    runner: Runner, tokenizer: PreTrainedTokenizerBase, ends: Collection[int] = ()
) -> LM:
    """Any runtime as the harness sees models, one request at a time: likelihoods by feeding a
    continuation token by token, texts greedily, up to one of the tokens in `ends`."""
    from lm_eval.api.model import TemplateLM

    ends, start = {tokenizer.eos_token_id, *ends}, tokenizer.bos_token_id

    class RunnerModel(TemplateLM):
        eot_token_id = tokenizer.eos_token_id
        # What an empty context is, as the harness has it for models in memory.
        prefix_token_id = tokenizer.eos_token_id if start is None else start

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
        ) -> list[int]:
            special = add_special_tokens is not False
            return tokenizer(string, add_special_tokens=special)["input_ids"]

        def _loglikelihood_tokens(
            self, requests: Sequence[Any], disable_tqdm: bool = False, **kwargs: Any
        ) -> list[tuple[float, bool]]:
            return [
                likelihood(runner, context, continuation)
                for _, context, continuation in track(requests, "likelihoods")
            ]

        def loglikelihood_rolling(
            self, requests: Sequence[Instance], disable_tqdm: bool = False
        ) -> list[float]:
            texts = [request.args[0] for request in requests]
            return [
                likelihood(runner, [self.prefix_token_id], self.tok_encode(text))[0]
                for text in track(texts, "likelihoods")
            ]

        def generate_until(
            self, requests: Sequence[Instance], disable_tqdm: bool = False
        ) -> list[str]:
            asked = [request.args for request in requests]
            return [self._generated(*args) for args in track(asked, "answering")]

        def _generated(self, text: str, settings: Mapping[str, Any]) -> str:
            """A greedy answer up to a stop string, a token of `ends` or `max_gen_toks`."""
            if settings.get("do_sample") and settings.get("temperature", 1.0) > 0:
                raise ConfigError(
                    "harness: exported models answer greedily; this task wants samples"
                )
            stops = settings.get("until") or []
            stops = [stops] if isinstance(stops, str) else stops
            most = int(settings.get("max_gen_toks", 256))
            return continued(runner, tokenizer, self.tok_encode(text), most, ends, stops)

    return RunnerModel()
