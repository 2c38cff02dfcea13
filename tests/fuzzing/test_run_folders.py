"""Whatever a file of somebody else's run holds, it is read or refused in one line, and none of it
is run."""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.errors import ElasticError
from elastic.exporting.foreign import identify
from elastic.files import read_json, write_json
from elastic.run import Run
from elastic.supernet.held_out import Compensated
from elastic.supernet.store import load_run, load_super_adapter, read_about
from elastic.training.callbacks import MetricsFile
from elastic.training.checkpoints import mark, newest
from tests.helpers.fuzzing import canary, damaged, fuzzed, mutated, works_or_is_refused
from tests.helpers.tiny import llama
from tests.helpers.tiny_runs import copy_run

BASE = llama(dtype=torch.float32)

SCORES = {"accuracy": 0.5, "accuracy_n": 8, "accuracy_interval": [0.2, 0.8]}
COMPENSATION = {"degree": 0.5, "sequential": False, "held_out_losses": {"0.5": 1.5}}
SCORED = {**SCORES, "held_out_loss": 1.5, "compensation": COMPENSATION}
RECOVERY = {
    "steps": 4, "folder": "other", "taken": True, "before": SCORED, "after": SCORED,
    "maximal": {"before": SCORED, "after": SCORED},
}  # fmt: skip


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory):
    """A run with all that training, search and export leave, and may be read again."""
    run = copy_run(trained, tmp_path_factory.mktemp("whole") / "run")
    net = load_run(run)[2]
    sub = net.space.uniform(0.5)
    best = {**SCORES, "compensation": COMPENSATION, "sub_adapter": sub.as_dict()}
    write_json(run.sub_adapters / "best.json", best)
    write_json(run.sub_adapters / "front-1.json", {**best, "recovery": RECOVERY})
    write_json(run.search / "about.json", {"settings": {"budget": {"prefill_ms": "80%"}}})
    report = {"formats": {"hf": {"path": "hf"}}, "sub_adapter": sub.as_dict()}
    write_json(run.path / "export" / "best" / "report.json", report)
    shutil.copytree(run.super_adapter, run.recovered / "other" / "super_adapter")
    shutil.copytree(run.super_adapter, run.checkpoints / "checkpoint-2")
    mark(run.checkpoints / "checkpoint-2")
    with canary(tmp_path_factory.mktemp("canary")):
        yield run


def everything(run: Run, name: str) -> None:
    """What the commands read of a run, each part even where another is refused."""
    digest = read_about(run.super_adapter)["base_digest"]
    parts = [run.config, run.space, run.origin, lambda: identify(str(run.path), digest)]
    parts += [
        lambda: used(run, name, digest),
        lambda: newest(run.checkpoints),
        lambda: resumed(run),
    ]
    refusals = []
    for part in parts:
        try:
            part()
        except ElasticError as error:
            refusals.append(error)
    if refusals:
        raise refusals[0]


def used(run: Run, name: str, digest: str) -> None:
    chosen = run.chosen(name)
    net = load_super_adapter(copy.deepcopy(BASE), digest, run.factors_of(chosen))
    sub = chosen.at(net.space)
    Compensated.of(chosen.compensation)
    run.export(chosen.name, sub, ["hf"])
    with net.active(sub, 0.5):
        pass


def resumed(run: Run) -> None:
    state = SimpleNamespace(is_world_process_zero=True, global_step=10**9)  # none is dropped
    MetricsFile(run.metrics).on_train_begin(None, state, None)


@fuzzed
@given(data=st.data())
def test_a_run_is_read_or_refused(whole, data):
    files = sorted(path for path in whole.path.rglob("*") if path.is_file())
    file = data.draw(st.sampled_from(files), label="file")
    content = file.read_bytes()
    name = data.draw(st.sampled_from(["best", "front-1"]))
    if file.suffix == ".json" and data.draw(st.booleans()):
        changed = json.dumps(data.draw(mutated(st.just(read_json(file))))).encode()
    else:
        changed = data.draw(damaged(content))
    file.write_bytes(changed)
    try:  # in its place: what other files say need not be parsed anew
        works_or_is_refused(everything, whole, name)
    finally:
        file.write_bytes(content)
