"""What a run has to choose from, for the folder of `elastic.formats.slices`: every sub-adapter of
its front and the maximal one, as models, and what is known of each."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from elastic.console import track
from elastic.evaluation.statistics import Score
from elastic.files import read_json
from elastic.formats.choosing import FULL
from elastic.formats.shards import Tensors
from elastic.formats.slices import Slice
from elastic.latency.latency_table import Timetable, read_timetable_of
from elastic.latency.target import LATENCIES
from elastic.plain import shaped
from elastic.run import Chosen, Run
from elastic.spaces.bound import SubAdapter
from elastic.supernet.cost import count
from elastic.supernet.depth import renamed
from elastic.supernet.held_out import Compensated
from elastic.supernet.store import read_factors
from elastic.supernet.streaming import Streamed
from elastic.supernet.supernet import Supernet

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_KEPT = (
    "best", "accuracy", "accuracy_n", "accuracy_interval", "difference", "difference_interval",
    "memory_mb", "validation_accuracy", "validation_estimate", "validation_n", "compensation",
)  # fmt: skip


@dataclass(frozen=True)
class EverySize:
    """Of one run, whose supernet is in memory, if need be without the base's weights."""

    run: Run
    net: Supernet
    best: Callable[[Chosen, SubAdapter], tuple[Compensated, PreTrainedModel | Streamed]]
    """How much of what it cuts a sub-adapter makes up for, and the model that is then."""
    chosen: Chosen
    """The one that was asked for, which need not be of the front."""
    seed: int
    tables: Sequence[str] = ()
    """Files of latency tables, as `read_timetable_of` has them."""

    @contextlib.contextmanager
    def factors_of(self, chosen: Chosen | None) -> Iterator[None]:
        """Inside, the net has those of this one, of nobody the run's own; then what it had."""
        before = {name: tensor.clone() for name, tensor in self.net.factor_state().items()}
        self.net.load_factors(read_factors(self.run.factors_of(chosen)))
        try:
            yield
        finally:
            self.net.load_factors(before)

    def slices(self) -> Iterator[Slice]:
        """One after another; the net has the run's own factors meanwhile."""
        for name, chosen in track(self._named.items(), "sizes"):
            sub = chosen.at(self.net.space, self.seed)
            with self.factors_of(chosen):
                made_up, made = self.best(chosen, sub)
            if isinstance(made, Streamed):
                model, tensors = made.model, self._own(made, chosen, sub, made_up)
            else:
                model, tensors = made, None
            cost = count(model)
            known = self._known(name, chosen.saved)
            figures = {"compensation": made_up.as_dict(), **known}
            figures |= {"params": cost.params, "macs": cost.macs}
            yield Slice(name, sub, model, figures, tensors)

    def _own(
        self, made: Streamed, chosen: Chosen, sub: SubAdapter, made_up: Compensated
    ) -> Tensors:
        """Tensors that the leading rows and columns may not give: making one to see takes time."""
        if self.run.factors_of(chosen) != self.run.super_adapter:
            return made.tensors
        kept, makes_up = self.net.space.kept(sub), made_up.degree or made_up.sequential
        cut = {renamed(kept, site) for site in self.net.space.reading} if makes_up else ()
        return {k: make for k, make in made.tensors.items() if k.rpartition(".")[0] in cut}

    def latencies(self) -> list[dict[str, Any]]:
        """Tables of milliseconds by slice: the one of the search, where there was one, and those
        of the files."""
        return [*self._searched(), *map(self._predicted, self.tables)]

    def _searched(self) -> Iterator[dict[str, Any]]:
        file = self.run.search / "about.json"
        members = {name: one.saved for name, one in self._named.items() if one.saved}
        if not file.is_file() or not members:
            return
        shape = {"device": str, "settings": {"timing": dict}}
        about = shaped(read_json(file), shape, file)
        timed = {name: _milliseconds(saved) for name, saved in members.items()}
        whole = next(iter(members.values()))
        if not all(f"full_{key}" in whole for key in LATENCIES):
            return  # an earlier version kept less
        timed[FULL] = {key: whole[f"full_{key}"] for key in LATENCIES}
        timing = {k: about["settings"]["timing"][k] for k in TIMED}
        trained = self.run.config().model.dtype
        yield {"device": about["device"], "dtype": trained, **timing, "slices": timed}

    def _predicted(self, file: str) -> dict[str, Any]:
        table = Timetable.from_dict(read_timetable_of(self.run, file), self.net.space)
        subs = {name: one.at(self.net.space, self.seed) for name, one in self._named.items()}
        timed = {
            name: {**{key: table(sub)[key] for key in LATENCIES}, "measured": False}
            for name, sub in subs.items()
        }
        timing = {key: getattr(table.target, key) for key in ("dtype", *TIMED)}
        return {"device": table.about["device"], **timing, "slices": timed}

    @functools.cached_property
    def _named(self) -> dict[str, Chosen]:
        found = {FULL: Chosen("maximal")}
        files = sorted(
            self.run.sub_adapters.glob("front-*.json"), key=lambda file: (len(file.stem), file.stem)
        )
        for file in files:
            one = self.run.chosen(file.stem)
            if not one.compress:  # its figures are those of rounded weights
                found[one.name] = one
        subs = [one.candidate.sub_adapter for one in found.values() if one.candidate]
        asked = self.chosen.at(self.net.space, self.seed)
        if asked not in subs and asked != self.net.space.maximal():
            found[_free(self.chosen.name, found)] = self.chosen
        return found

    def _known(self, name: str, saved: Mapping[str, Any]) -> dict[str, Any]:
        """As the search's file of it says; of the full model as the others' say."""
        if name != FULL:
            return {key: saved[key] for key in _KEPT if key in saved}
        for one in self._named.values():
            marks = one.saved.get("full_correct")
            if isinstance(marks, str) and marks:
                names = {"full_memory_mb": "memory_mb",
                         "full_validation_accuracy": "validation_estimate"}  # fmt: skip
                told = {name: one.saved[key] for key, name in names.items() if key in one.saved}
                return {**Score.of_marks(marks).as_dict(), **told}
        return {}

    def name_of(self, sub: SubAdapter) -> str:
        """The slice that this sub-adapter is, with the factors of the one that was asked for: one
        of the front may be the maximal one, trained on."""
        alike = [n for n, one in self._named.items() if one.at(self.net.space, self.seed) == sub]
        factors = self.run.factors_of(self.chosen)
        return next((n for n in alike if self.run.factors_of(self._named[n]) == factors), alike[0])


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """The name, or with a number behind it that nobody has: a file may be called `full`."""
    names = [name, *(f"{name}-{number}" for number in range(2, len(taken) + 3))]
    return next(each for each in names if each not in taken)


TIMED = ("runtime", "merged", "prompt_tokens", "new_tokens", "batch")


def _milliseconds(saved: Mapping[str, Any]) -> dict[str, Any]:
    """As measured, else as the search's table has it."""
    measured = saved.get("measured") or {}
    return {**{key: measured.get(key, saved[key]) for key in LATENCIES}, "measured": bool(measured)}
