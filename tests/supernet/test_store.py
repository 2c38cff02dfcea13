"""What the directory of a super-adapter holds is right, or refused before anything is computed."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from elastic.config import ModelConfig
from elastic.errors import RunError
from elastic.supernet.store import (
    ABOUT,
    FACTORS,
    MOMENTS,
    ORDER,
    SPACE,
    load_super_adapter,
    save_super_adapter,
)
from tests.helpers import tiny

GROUP = "model.layers.0.mlp_width"
SITE = "model.layers.0.mlp.down_proj"


@pytest.fixture
def saved(tmp_path):
    """The directory of a super-adapter whose channels are in a random order, with moments."""
    net = tiny.supernet("lora", heads=True, dtype=torch.float32)
    net.reorder(tiny.permutations(net))
    moments = {site: torch.eye(net.layer(site).base.in_features) for site in net.space.reading}
    place = tmp_path / "super_adapter"
    save_super_adapter(net, place, model=ModelConfig(), base_digest="sha256:0", moments=moments)
    return place


def load(place):
    net = load_super_adapter(tiny.llama(dtype=torch.float32), "sha256:0", place)
    return tiny.logits(net.model, tiny.tokens())


def change(file, edit) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file)


def test_what_was_saved_is_loaded(saved):
    expected = load(saved)
    assert torch.equal(load(saved), expected) and torch.isfinite(expected).all()


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda order: order[GROUP].__setitem__(0, order[GROUP][1]), "no permutation of 64 places"),
        (lambda order: order[GROUP].add_(1), "no permutation"),
        (lambda order: order.__setitem__(GROUP, order[GROUP][:-1].clone()), "no permutation"),
        (lambda order: order.__setitem__(GROUP, order[GROUP].double()), "no permutation"),
        (lambda order: order.__setitem__(GROUP, order[GROUP][None].clone()), "no permutation"),
        (lambda order: order.pop(GROUP), f"{GROUP} is missing"),
        (lambda order: order.__setitem__("x", order[GROUP].clone()), "x is no group of this space"),
    ],
)
def test_an_order_permutes_every_group(saved, edit, message):
    """Else channels would be doubled and others lost."""
    change(saved / ORDER, edit)
    with pytest.raises(RunError, match=message):
        load(saved)


@pytest.mark.parametrize("value", [1e38, -1e38, float("inf"), float("nan")])
def test_factors_have_finite_products(saved, value):
    change(saved / FACTORS, lambda factors: next(iter(factors.values())).view(-1).fill_(value))
    with pytest.raises(RunError, match="infinite"):
        load(saved)


@pytest.mark.parametrize("name", [FACTORS, ORDER, MOMENTS])
@pytest.mark.parametrize("content", [b"", b"\0" * 100, b"[" * 100, None])
def test_damaged_tensors_are_named(saved, name, content):
    whole = (saved / name).read_bytes()
    (saved / name).write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(RunError, match=f"{name}: damaged"):
        load(saved)


def test_moments_are_of_layers_that_are_there(saved):
    change(saved / MOMENTS, lambda moments: moments.pop(f"{SITE}.correlation"))
    with pytest.raises(RunError, match=f"no moments of {SITE}"):
        load(saved)
    save_file({f"{SITE}.scale": torch.ones(2), f"{SITE}.correlation": torch.ones(1)},
              saved / MOMENTS)  # fmt: skip
    with pytest.raises(RunError, match=f"{SITE}, 2 wide, is no such layer here"):
        load(saved)


@pytest.mark.parametrize("name", ["base_model", "base_digest", "adapter"])
@pytest.mark.parametrize("value", [None, 5, "gone"])
def test_what_is_said_of_a_super_adapter_has_its_shape(saved, name, value):
    about = json.loads((saved / ABOUT).read_text())
    del about[name]
    if value != "gone":
        about[name] = value
    (saved / ABOUT).write_text(json.dumps(about))
    with pytest.raises(RunError, match=f"about.json: {name}"):
        load(saved)


@pytest.mark.parametrize("name", [SPACE, ABOUT])
@pytest.mark.parametrize("content", [b"caf\xe9", b"\0", b"[" * 5000, b"&a [*a]", b""])
def test_other_damage_is_named(saved, name, content):
    (saved / name).write_bytes(content)
    with pytest.raises(Exception, match=name) as caught:
        load(saved)
    assert isinstance(caught.value, RunError | ValueError)
