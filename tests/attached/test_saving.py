"""`save_pretrained` of a compact model: what anyone saves of it, a Trainer too, loads again."""

import copy
import json

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import elastic
from elastic.errors import ExportError
from tests.attached.test_attached import attached
from tests.helpers import tiny

SIZES = {"model.layers.0.mlp_width": 16, "model.layers.1.mlp_width": 32}


def small(net, **sizes):
    """With other sizes than the model at some groups."""
    choices = dict(net.space.maximal().choices) | sizes
    return elastic.compact(net.supernet, elastic.SubAdapter(tuple(choices.items())))


def loaded(folder):
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)


def same(model, other):
    mine, theirs = model.state_dict(), other.state_dict()
    assert list(mine) == list(theirs)
    torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
    torch.testing.assert_close(tiny.logits(model, tiny.tokens()), tiny.logits(other, tiny.tokens()))


@pytest.fixture(scope="module")
def net():
    return attached()


@pytest.mark.parametrize("own", [SIZES, dict.fromkeys(SIZES, 16), {}])
def test_it_loads_again(net, tmp_path, own):
    model = small(net, **own)
    (tmp_path / "checkpoint-1").mkdir()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "checkpoint-1").is_dir(), "only its own files are written"
    assert (tmp_path / "modeling_elastic.py").is_file() == (own is SIZES)
    same(loaded(tmp_path), model)
    # and once more, as the class in the folder
    loaded(tmp_path).save_pretrained(tmp_path / "again")
    same(loaded(tmp_path / "again"), model)


def test_a_trainer_saves_what_it_trained(net, tmp_path):
    before = copy.deepcopy(small(net, **SIZES))  # else some of it would be the supernet's
    model = copy.deepcopy(before).requires_grad_(True)
    rows = [{"input_ids": row, "labels": row} for row in tiny.tokens(4, 6)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, use_cpu=True,
        report_to=[], disable_tqdm=True, save_steps=1, learning_rate=1e-2,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=rows).train()
    same(loaded(tmp_path / "checkpoint-2"), model.eval())
    # A copy saves itself, and not what it was copied from.
    before.save_pretrained(tmp_path / "before")
    same(loaded(tmp_path / "before"), before)
    resumed = Trainer(before.requires_grad_(True), arguments, train_dataset=rows)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    same(resumed.model.eval(), model)


def test_the_state_that_is_given_is_saved_by_one_process(net, tmp_path):
    model = small(net, **SIZES)
    halved = {name: tensor / 2 for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path / "other", is_main_process=False, state_dict=halved)
    assert not (tmp_path / "other").exists()
    model.save_pretrained(tmp_path / "one", state_dict=halved, max_shard_size="10KB")
    assert len(list((tmp_path / "one").glob("*.safetensors"))) > 1
    torch.testing.assert_close(loaded(tmp_path / "one").state_dict(), halved, rtol=0, atol=0)


def test_adapters_in_the_model_are_saved_alone_and_merged_ones_with_it(net, tmp_path, monkeypatch):
    # transformers 5.24 asks for a version that is not released.
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "0.21.0")
    model = small(net, **SIZES)
    lora = peft.LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model.add_adapter(lora)
    model.save_pretrained(tmp_path / "alone")
    files = {file.name for file in (tmp_path / "alone").iterdir()}
    assert "adapter_model.safetensors" in files and "model.safetensors" not in files
    merged = peft.get_peft_model(small(net, **SIZES), lora).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    same(loaded(tmp_path / "merged"), merged)


def test_it_is_not_pushed_while_it_is_saved(net, tmp_path):
    with pytest.raises(ExportError, match="then upload the folder"):
        net.compact("minimal").save_pretrained(tmp_path / "no", push_to_hub=True)
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("sizes", [("50GB", "10KB"), ("10KB", "50GB"), ("10KB", "20KB")])
def test_what_is_saved_over_another_is_what_loads(net, tmp_path, sizes):
    """However many files the weights of either are."""
    before, model = small(net, **dict.fromkeys(SIZES, 48)), small(net, **SIZES)
    before.save_pretrained(tmp_path, max_shard_size=sizes[0])
    model.save_pretrained(tmp_path, max_shard_size=sizes[1])
    same(loaded(tmp_path), model)
    index = tmp_path / "model.safetensors.index.json"
    weights = {file.name for file in tmp_path.glob("*.safetensors")}
    named = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else None
    assert weights == (named or {"model.safetensors"})


def test_what_it_cannot_save_so_is_said_on_one_line(net, tmp_path):
    model = small(net, **SIZES)
    state = {f"module.{name}": tensor for name, tensor in model.state_dict().items()}
    with pytest.raises(ExportError, match=r"embed_tokens\.weight of the model is not among"):
        model.save_pretrained(tmp_path / "no", state_dict=state)
    with pytest.raises(ExportError, match="variant 'fp16'"):
        model.save_pretrained(tmp_path / "no", variant="fp16")
    assert not list(tmp_path.glob("no/*"))
