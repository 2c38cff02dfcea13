"""A run directory: where every command finds what the one before it left."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from elastic.config import BudgetConfig, ModelConfig, TrainConfig
from elastic.config.model import of_earlier_version
from elastic.console import say
from elastic.distributed import is_main
from elastic.errors import RunError
from elastic.files import (
    clear_leftovers,
    is_leftover,
    lock,
    named_failure,
    read_json,
    tag,
    write_text,
)
from elastic.models.packaged import cache_directory
from elastic.plain import is_name, parse_yaml, read_text, read_yaml, shaped
from elastic.spaces.bound import BoundSpace, Candidate, SubAdapter, require_named
from elastic.spaces.declared import SearchSpace

SCORES = {"accuracy": float, "accuracy_n": int, "accuracy_interval": [float, float]}
"""Of a scored sub-adapter, as far as it is read again."""
_BEFORE = {**SCORES, "held_out_loss": float, "compensation": dict}
RECOVERY = {
    "steps": int, "folder": str, "taken": bool, "before": _BEFORE, "after": _BEFORE,
    "maximal": {"before": {"accuracy": float}, "after": {"accuracy": float}},
}  # fmt: skip
"""The same of one that was trained on."""


@dataclass(frozen=True)
class Chosen:
    """What `--sub_adapter` means: a candidate from a file, or a name that any space knows."""

    name: str
    candidate: Candidate | None = None
    saved: Mapping[str, Any] = field(default_factory=dict)
    """All that the search of this run wrote about it."""
    compensation: Mapping[str, Any] | None = None
    """As its file says (`elastic.supernet.held_out.Compensated`); None: it does not."""
    recovery: Mapping[str, Any] | None = None
    """As its file says (`elastic.recovery`); None: it was not trained on."""

    @property
    def compress(self) -> str | None:
        return self.candidate.compress if self.candidate else None

    def at(self, space: BoundSpace, seed: int = 0) -> SubAdapter:
        """A point of this space; RunError if it is none."""
        if self.candidate is None:
            return space.named(self.name, seed)
        return space.check(self.candidate.sub_adapter)


class Run:
    """Names the files below RUN; reads and checks, never loads weights."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.config_file = self.path / "config.yaml"
        self.data = self.path / "data.json"
        self.rows = self.path / "rows"  # those that were given from Python
        self.super_adapter = self.path / "super_adapter"
        self.metrics = self.path / "train" / "metrics.jsonl"
        self.checkpoints = self.path / "train" / "checkpoints"
        self.moments = self.path / "train" / "moments.safetensors"  # while it trains
        self.sub_adapter = self.path / "sub_adapter.json"  # of a run that trained only that one
        self.search = self.path / "search"
        self.front = self.search / "front.json"
        self.report = self.search / "report.html"
        self.sub_adapters = self.search / "sub_adapters"
        self.recovered = self.search / "recovered"
        self.exports = self.path / "export"
        self.tasks = self.path / "tasks"

    def claim(self, config: TrainConfig) -> bool:
        """Whether this very configuration has been trained here already.

        RunError when the directory holds another run, or things that are no run at all.
        """
        trust_(config.model)
        if self.config_file.is_file():
            mine, theirs = _identity(config), _identity(self.begun())
            mine.pop("run"), theirs.pop("run", None)  # a run may be moved
            # So may its base and its data, if their digests tell that they are the same.
            movable = MOVABLE if self.data.is_file() else ()
            differing = [d for d in differences(mine, theirs) if d.split()[0] not in movable]
            if differing:
                raise RunError(
                    f"{self.path} holds another run, which differs in {', '.join(differing[:4])}; "
                    "choose another --run, or delete the directory"
                )
            return self.super_adapter.is_dir()
        if self.path.exists() and (
            not self.path.is_dir()
            or any(not is_leftover(each) and each != self.rows for each in self.path.iterdir())
        ):
            raise RunError(
                f"{self.path} is not empty and not a run (no config.yaml); choose another --run"
            )
        return False

    def begin(self, config: TrainConfig) -> None:
        """Keep the settings, before anything is trained."""
        if not self.config_file.is_file():
            write_text(self.config_file, yaml.safe_dump(_identity(config), sort_keys=False))

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """No other command trains here while the block lasts: the end of one that does is waited
        for, and that is said."""
        with waiting(self.path, "trains it") if is_main() else contextlib.nullcontext():
            yield

    def clear(self) -> None:
        """Remove what training needs no more, and what a kill left half written."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)
        self.moments.unlink(missing_ok=True)
        for folder in (self.path, self.path / "train"):
            clear_leftovers(folder)

    def move(self, config: TrainConfig) -> None:
        """Keep where base and data are now; they are known to be the same."""
        now = _identity(config)
        text = yaml.safe_dump(now, sort_keys=False)
        if read_text(self.config_file) == text:  # which spares checking it
            return
        if any(d.split()[0] in MOVABLE for d in differences(now, _identity(self.begun()))):
            write_text(self.config_file, text)

    def begun(self) -> TrainConfig:
        """config.yaml through the dataclass: a setting that did not exist then has its default."""
        return _settings(read_text(self.config_file), str(self.config_file))

    def config(self) -> TrainConfig:
        """The settings the super-adapter was trained with; RunError if nothing was."""
        if self.tasks.is_dir():
            stages = sorted(str(path) for path in self.tasks.iterdir())
            raise RunError(f"{self.path} is a sequence of tasks; name one: {', '.join(stages)}")
        if not self.config_file.is_file() or not self.super_adapter.is_dir():
            state = "has no trained super-adapter" if self.path.is_dir() else "does not exist"
            raise RunError(f"{self.path} {state}; run: elastic train --run {self.path}")
        config = self.begun()
        require_trusted(config.model, self.config_file)
        return config

    def space(self) -> SearchSpace:
        """The declared space the super-adapter was trained with."""
        file = self.super_adapter / "space.yaml"
        return SearchSpace.from_dict(read_yaml(file), str(file))

    def chosen(self, name: str) -> Chosen:
        """What `--sub_adapter` means; reads its file, the one time.

        best (of the search, or the only one trained), a name of the search's front, a JSON file, or
        maximal, heuristic, minimal, random, uniform-FRACTION. RunError while there is no best one,
        for another name, or for a file of something else.
        """
        file = self.sub_adapters / f"{name}.json"
        if Path(name).suffix == ".json":
            name, file = Path(name).stem, Path(name)
        elif name == "best" and not file.is_file():
            name, file = "specialised", self.sub_adapter
            if not file.is_file():
                path = self.path
                raise RunError(f"{path} has no search result yet; run: elastic search {path}")
        elif not is_name(name) or not file.is_file():
            require_named(name)
            return Chosen(name)
        if not is_name(name):
            raise RunError(
                f"{file}: its name is given to folders; rename it to begin with a letter"
            )
        value = read_json(file)
        candidate, said = Candidate.of(value, file), value.get("compensation")
        if (recovery := value.get("recovery")) is not None:
            shaped(recovery, RECOVERY, f"{file}: recovery")
            if not is_name(recovery["folder"]):
                raise RunError(f"{file}: recovery: folder is {recovery['folder']!r}; give a name")
        if file.resolve().parent != self.sub_adapters.resolve():
            return Chosen(name, candidate, compensation=said, recovery=recovery)
        # An earlier version, which says nothing of it, made up for nothing.
        said = said or {"degree": 0.0, "held_out_losses": {}}
        return Chosen(name, candidate, value, said, recovery)

    def factors_of(self, chosen: Chosen | None) -> Path:
        """The super-adapter in which it has its factors: this run's, or what is left of the one
        that was trained on for it."""
        recovery = (chosen and chosen.recovery) or {}
        if not recovery.get("taken"):
            return self.super_adapter
        return Run(self.recovered / recovery["folder"]).super_adapter

    def resolve(self, name: str, space: BoundSpace, seed: int = 0) -> tuple[str, SubAdapter]:
        """What `--sub_adapter` means: a name and a point of the space."""
        chosen = self.chosen(name)
        return chosen.name, chosen.at(space, seed)

    def export(self, name: str, sub: SubAdapter, kinds: Sequence[str]) -> Path:
        """The directory of an export; RunError if something else stands there, or formats of this
        very sub-adapter that are not to be written again: they would be lost."""
        directory = self.exports / name
        if not directory.exists():
            return directory
        if not (directory / "report.json").is_file():
            raise RunError(f"{directory} exists and is no export; choose another --name")
        file = directory / "report.json"
        before = shaped(read_json(file), {"formats": dict}, file)
        there = [kind for kind, each in before["formats"].items() if "path" in each]
        lost = [kind for kind in there if kind not in kinds]
        if lost and before.get("sub_adapter") == sub.as_dict():
            raise RunError(
                f"{directory} has {', '.join(lost)} of this sub-adapter, which would be lost; "
                f"write all of it (now {', '.join(kinds)}) or choose another --name"
            )
        return directory

    def origin(self) -> dict[str, Any]:
        """What a sub-adapter of it was made from and, if it was searched, within which budget."""
        trained, about, budget = self.config(), self.search / "about.json", None
        task = trained.task
        if about.is_file():
            asked = shaped(read_json(about), {"settings": {"budget": dict}}, about)
            budget = _budget(asked["settings"]["budget"], str(about)).limits()
        return {
            "base_model": trained.model.path,
            "method": trained.adapter.resolved_method,
            "space": trained.space,
            # A file by its name alone: its folder is nobody else's business.
            "task": task.dataset or (Path(task.train).name if task.train else task.name),
            "budget": budget,
        }

    def show(self) -> None:
        """What training left, and what to do next."""
        if self.sub_adapter.is_file():
            print(f"Sub-adapter, trained alone: {self.sub_adapter}")
            print(f"Next: elastic evaluate {self.path} --sub_adapter best, then elastic export")
            return
        print(f"Super-adapter: {self.super_adapter}")
        print(f"Next: elastic search {self.path} --budget.prefill_ms 80%")


MOVABLE = (
    "model.path", "task.train", "task.validation", "task.test", "task.dataset", "task.folder"
)  # fmt: skip
"""Settings that say where something is, and not what."""


@contextlib.contextmanager
def waiting(folder: Path, doing: str) -> Iterator[None]:
    """This process alone has the folder, which it makes, while the block lasts. Whose end it waits
    for is said; a new folder that is still empty in the end goes again."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    with named_failure(folder), contextlib.suppress(FileExistsError):  # a file, refused elsewhere
        folder.mkdir(parents=True, exist_ok=True)
    try:
        told = f"{folder}: waiting for {{}}, which {doing}"
        with lock(folder, wait=True, say=lambda who: say(told.format(who))) as alone:
            if not alone:
                say(f"{folder}: this file system locks no folders; run one command at a time on it")
            yield
    finally:
        with contextlib.suppress(OSError):
            for path in new:
                path.rmdir()


def trust_(model: ModelConfig) -> None:
    """Remember, for this user on this machine, that the code of this base may be run, if these
    settings, which a user gave to train with, say so."""
    if model.trust_remote_code:
        write_text(_trusted(model), f"{model.path}\n")


def require_trusted(model: ModelConfig, file: Path) -> None:
    """RunError where a run that somebody else may have made asks to run its base's code, and nobody
    has trained here with that allowed."""
    if model.trust_remote_code and not _trusted(model).is_file():
        raise RunError(
            f"{file} asks to run Python code of {model.path}, which was not allowed on this "
            f"machine; read that code, then allow it: elastic train {file.parent} --config {file} "
            "--model.trust_remote_code true"
        )


def _trusted(model: ModelConfig) -> Path:
    """Where it is remembered: by the folder, or the name on the hub."""
    folder = Path(model.path).expanduser()
    name = str(folder.resolve()) if folder.exists() else model.path
    return cache_directory() / "trusted" / tag(name)


@functools.lru_cache(maxsize=4)  # a command asks several times, and checking takes a while
def _settings(text: str, where: str) -> TrainConfig:
    from elastic.config.parsing import from_dict

    value = shaped(parse_yaml(text, where, RunError), dict, where)
    task = value.get("task")
    if isinstance(task, dict) and "draw" not in task:
        value["task"] = of_earlier_version(task)
    return from_dict(TrainConfig, value, where)


def _budget(value: Mapping[str, Any], where: str) -> BudgetConfig:
    from elastic.config.parsing import from_dict

    return from_dict(BudgetConfig, value, where)


def _identity(config: TrainConfig) -> dict[str, Any]:
    """What a run is known by: not whether it was ever rehearsed."""
    plain = as_plain(config)
    del plain["dry_run"]
    return plain


def as_plain(config: Any) -> dict[str, Any]:
    """A configuration as dictionaries, lists and scalars."""
    return json.loads(json.dumps(dataclasses.asdict(config)))  # tuples become lists


def differences(mine: dict[str, Any], theirs: dict[str, Any], prefix: str = "") -> list[str]:
    """What two configurations say differently, a line for each setting."""
    found = []
    for key in dict.fromkeys((*mine, *theirs)):
        a, b = mine.get(key), theirs.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key} ({b} there, {a} here)")
    return found
