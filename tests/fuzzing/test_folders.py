"""Whatever a folder of every size holds, one is loaded or it is refused in one line, and none of it
is run."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import elastic
from elastic.files import read_json
from elastic.formats import slices
from tests.formats.test_slices import cut, write
from tests.helpers import tiny
from tests.helpers.fuzzing import canary, damaged, fuzzed, mutated, works_or_is_refused

TABLE = {"device": "a phone", "dtype": "float32", "runtime": "torch", "merged": True, "batch": 1,
         "prompt_tokens": 4, "new_tokens": 1}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("sizes") / "folder"
    net = tiny.supernet(heads=True, dtype=torch.float32)
    made = cut(net, degree=0.5)
    times = {one.name: {"prefill_ms": 1.0, "decode_ms": 1.0} for one in made}
    for one in made:
        one.figures.update(validation_estimate=0.5, best=one.name == "front-1")
    write(net, place, made, torch.float32, [TABLE | {"slices": times}])
    with canary(tmp_path_factory.mktemp("canary")):
        yield place


WANTED = (
    {"slice": "front-1"}, {"budget": {"prefill_ms": "90%", "params": "100%"}}, {},
    {"slice": "small", "resizable": True},
)  # fmt: skip


@fuzzed
@given(data=st.data())
def test_a_folder_is_read_or_refused(folder, data):
    files = sorted(
        file for file in folder.rglob("*") if file.suffix in (".json", ".safetensors", ".yaml")
    )
    index = folder / slices.INDEX
    file = data.draw(st.sampled_from([*files, index, index]), label="file")
    content = file.read_bytes()
    if file.suffix == ".json" and data.draw(st.booleans()):
        changed = json.dumps(data.draw(mutated(st.just(read_json(file))))).encode()
    else:
        changed = data.draw(damaged(content))
    wanted = data.draw(st.sampled_from(WANTED))
    file.unlink()  # it may be mapped still
    file.write_bytes(changed)
    try:
        works_or_is_refused(lambda: elastic.load(folder, device="cpu", **wanted))
    finally:
        file.unlink()
        file.write_bytes(content)
