"""Adapters of stock PEFT: merged, they compute what PEFT's own unmerged model does."""

import copy
import functools
import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    GPT2LMHeadModel,
    SwitchTransformersConfig,
    SwitchTransformersForConditionalGeneration,
)

from elastic.config import MergeAdapterConfig, MergeConfig, ModelConfig
from elastic.errors import ExportError, ModelError, RunError
from elastic.exporting import foreign
from elastic.exporting.merge import carrying, combine
from elastic.formats import hf
from elastic.models import loading
from elastic.models.digest import digest_of
from elastic.models.modules import of_conv1d_
from elastic.supernet.compact import compact
from elastic.supernet.supernet import Supernet
from tests.helpers import tiny
from tests.helpers.families import model_of
from tests.helpers.graphs import same_in_every_runtime
from tests.helpers.laws import close, some_moments
from tests.helpers.tiny import logits, tokens

pytestmark = [
    # peft 0.21 still reads the old name of a property that transformers renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:.*ensure_weight_tying"),
]

LORA = dict(r=3, lora_alpha=6)
TIED = {"ensure_weight_tying": True}
ENDS = {
    "head": LORA | {"target_modules": ["lm_head"]},
    "embeddings": LORA | {"target_modules": ["embed_tokens"]},
    "both": LORA | {"target_modules": ["lm_head", "embed_tokens"]},
    "head, dora": LORA | {"target_modules": ["lm_head"], "use_dora": True},
    "embeddings, dora": LORA | {"target_modules": ["embed_tokens"], "use_dora": True},
    "saved head": LORA | {"target_modules": ["up_proj"], "modules_to_save": ["lm_head"]},
    "saved embeddings": LORA | {"target_modules": ["up_proj"], "modules_to_save": ["embed_tokens"]},
    "saved both": LORA
    | {"target_modules": ["up_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "tokens": LORA
    | {"target_modules": ["up_proj"], "trainable_token_indices": {"embed_tokens": [5, 9, 40]}},
    "embeddings, kept tied": LORA | {"target_modules": ["embed_tokens"]} | TIED,
    "both, kept tied": LORA | {"target_modules": ["lm_head", "embed_tokens"]} | TIED,
    "saved embeddings, kept tied": LORA
    | {"target_modules": ["up_proj"], "modules_to_save": ["embed_tokens"]}
    | TIED,
}
STILL_TIED = {"tokens", *(name for name in ENDS if name.endswith("kept tied"))}
PRECISION = 1e-5


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Bases by whether their head is their embeddings."""
    path = tmp_path_factory.mktemp("bases")
    return {
        tied: tiny.save_tiny(path / str(tied), tie_word_embeddings=tied) for tied in (True, False)
    }


def base_of(folder) -> ModelConfig:
    return ModelConfig(path=str(folder), dtype="float32", device="cpu")


@functools.cache
def _read_base(folder: str):
    return loading.load_model(folder, base_of(folder))


def load_base(folder):
    """A copy: reading it takes longer than all else."""
    return copy.deepcopy(_read_base(str(folder)))


def adapter(folder, path, **settings):
    """A saved PEFT adapter, whose every trained tensor has moved: what starts at zero would prove
    nothing."""
    model = get_peft_model(load_base(folder), LoraConfig(**settings))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)
    return path


def update_of(folder, path) -> foreign.Update:
    return foreign.read(foreign.identify(str(path), "any"), base_of(folder), "any")


def merging(path, **settings) -> MergeConfig:
    return MergeConfig(adapters=[MergeAdapterConfig(path=str(path))], **settings)


def supernet(folder) -> Supernet:
    net = Supernet(load_base(folder), tiny.space(heads=True), tiny.ADAPTERS["lora"])
    net.reorder(tiny.permutations(net))
    return tiny.randomize_(net)


def unmerged(model, path):
    """What stock PEFT computes with the adapter beside the model."""
    return logits(PeftModel.from_pretrained(model, str(path)).eval(), tokens())


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ENDS)
def test_an_adapter_of_head_or_embeddings_changes_what_it_adapts_alone(
    folders, tmp_path, kind, tied
):
    """Its layers are not cut, so PEFT can run it on the compact model as well."""
    folder = folders[tied]
    path = adapter(folder, tmp_path / "theirs", **ENDS[kind])
    update, net = update_of(folder, path), supernet(folder)
    plain = logits(load_base(folder), tokens())
    expected = unmerged(load_base(folder), path)
    assert not torch.allclose(expected, plain, atol=0.01)
    whole, _ = combine(net, net.space.maximal(), [update], merging(path, weight=0.0))
    close(logits(whole, tokens()), expected, PRECISION)
    if "up_proj" not in ENDS[kind]["target_modules"]:
        sub = net.space.minimal()
        small, _ = combine(net, sub, [update], merging(path))
        close(logits(small, tokens()), unmerged(compact(net, sub), path), PRECISION)
    one = whole.lm_head.weight is whole.model.embed_tokens.weight
    assert one == whole.config.tie_word_embeddings == (tied and kind in STILL_TIED)


@pytest.mark.parametrize("degree", [0.0, 0.5])
def test_what_is_merged_is_what_the_supernet_computes_with_every_update_beside_it(
    folders, tmp_path, degree
):
    """Whole updates on the base, then cut, at any weights; and the supernet is as it was."""
    paths = [
        adapter(folders[True], tmp_path / "0", **LORA, target_modules=["lm_head", "o_proj"]),
        adapter(folders[True], tmp_path / "1", **LORA, target_modules=["down_proj", "lm_head"]),
    ]
    updates, net = [update_of(folders[True], path) for path in paths], supernet(folders[True])
    net.compensation = some_moments(net)
    entries = [MergeAdapterConfig(path="0", weight=0.5), MergeAdapterConfig(path="1", weight=-2.0)]
    config, sub = MergeConfig(adapters=entries, weight=1.5), net.space.minimal()
    with net.active(sub, degree):
        before = logits(net.model, tokens())
    with carrying(net, sub, updates, config, degree) as active:
        expected = logits(active, tokens())
    small, _ = combine(net, sub, updates, config, degree=degree)
    close(logits(small, tokens()), expected, PRECISION)
    assert not torch.allclose(before, expected, atol=0.01)
    with net.active(sub, degree):
        assert torch.equal(logits(net.model, tokens()), before)


def test_an_adapter_of_the_head_of_a_tied_base_in_every_format(folders, tmp_path):
    """What is written is what stock PEFT computes beside the compact model of the super-adapter."""
    net = supernet(folders[True])
    path, sub = tmp_path / "theirs", net.space.minimal()
    adapter(folders[True], path, **LORA, target_modules=["lm_head"])
    small, _ = combine(net, sub, [update_of(folders[True], path)], merging(path))
    written = hf.load(hf.write(small, None, tmp_path / "hf"), torch.float32)
    assert not written.config.tie_word_embeddings
    close(logits(written, tokens()), unmerged(compact(net, sub), path), PRECISION)
    same_in_every_runtime(small, tmp_path / "graphs")


def test_an_adapter_that_merging_would_change_is_refused(folders, tmp_path, monkeypatch):
    """As PEFT runs it, against what PEFT merged; here as if its merging had lost the ties."""
    folder = folders[True]
    path = adapter(folder, tmp_path / "theirs", **LORA, target_modules=["lm_head"])
    monkeypatch.setattr(foreign, "untie_", lambda _: None)
    with pytest.raises(ExportError, match=r"theirs, merged by PEFT: .* the adapter unmerged"):
        foreign.read(path, base_of(folder), digest_of(folder), [tokens(1).numpy()])


def test_layers_of_gpt2_that_an_adapter_holds_whole_lie_as_it_was_trained(tmp_path):
    """A Conv1D's matrix is (in, out): where it is square nothing but its values tells."""
    sizes = {"n_embd": 32, "n_inner": 96, "n_layer": 1, "n_head": 4}
    folder = tmp_path / "gpt2"
    stock = model_of("gpt2", torch.float32, **sizes)
    of_conv1d_(stock).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    stock = GPT2LMHeadModel.from_pretrained(folder).eval()
    theirs = get_peft_model(
        stock, LoraConfig(**LORA, target_modules=["c_attn"], modules_to_save=["c_proj", "ln_1"])
    )
    generator = torch.Generator().manual_seed(0)
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    theirs.save_pretrained(tmp_path / "theirs")
    update, merged = update_of(folder, tmp_path / "theirs"), load_base(folder)
    for name, delta in update.deltas.items():
        merged.get_parameter(name).data += delta
    close(logits(merged, tokens()), logits(theirs.eval(), tokens()), PRECISION)
    assert "transformer.h.0.attn.c_proj.weight" in update.deltas


def test_a_class_that_is_always_tied_is_no_folder_with_two_tensors(tmp_path):
    folder = tiny.save_t5(tmp_path / "t5")
    model = load_base(folder)
    assert hf.why_not_untied(model) is None
    model.config.tie_word_embeddings = False
    assert "always loaded with one tensor" in hf.why_not_untied(model)


def spoilt(folder, **settings):
    """Change an adapter's configuration."""
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


@pytest.mark.parametrize(
    "content", [b"", b"\x80\x04pickle", b"\xff" * 8 + b"{}", None], ids=repr
)  # fmt: skip
def test_weights_that_are_no_tensors_are_refused_on_one_line(folders, tmp_path, content):
    path = adapter(folders[False], tmp_path / "theirs", **LORA, target_modules=["lm_head"])
    file = path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-9] if content is None else content)
    with pytest.raises(RunError, match=r"^merge: .*safetensors cannot be read \([^\n]*$"):
        foreign.identify(str(path), "any")


def test_an_adapter_that_cannot_be_merged_is_told_from_its_configuration(folders, tmp_path):
    base = base_of(folders[False])
    path = adapter(folders[False], tmp_path / "theirs", **LORA, target_modules=["q_proj"])
    with pytest.raises(RunError, match="PROMPT_TUNING puts vectors beside the prompt"):
        foreign.identify(str(spoilt(path, peft_type="PROMPT_TUNING")), "any", base)
    spoilt(path, peft_type="LORA", init_lora_weights="pissa_niter_4")
    with pytest.raises(RunError, match="cannot be merged: it began by pissa_niter_4"):
        foreign.identify(str(path), "any", base)
    spoilt(path, init_lora_weights=True, lora_bias=True)
    with pytest.raises(RunError, match=r"it trained biases, and .*q_proj of .* has none$"):
        foreign.identify(str(path), "any", base)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"r": 2}, "does not fit .* size mismatch"),
        ({"r": 10**12}, "rank 1000000000000 is more than any tensor"),
        ({"target_modules": ["nowhere"]}, "does not fit .* Target modules"),
        ({"layers_to_transform": "x", "layers_pattern": 3}, "does not fit"),
        ({"use_dora": True}, "magnitude_vector.* is missing"),
    ],
)
def test_a_configuration_of_other_weights_is_refused_on_one_line(
    folders, tmp_path, settings, match
):
    path = adapter(folders[False], tmp_path / "theirs", **LORA, target_modules=["q_proj"])
    with pytest.raises(RunError, match=match) as caught:
        update_of(folders[False], spoilt(path, **settings))
    assert "\n" not in str(caught.value)


def test_what_peft_finds_out_while_it_merges_is_told_on_one_line(folders, tmp_path):
    path = adapter(
        folders[False], tmp_path / "theirs", **LORA, target_modules=r".*\.q_proj", lora_bias=True
    )  # fmt: skip
    with pytest.raises(RunError, match=r"^merge: PEFT cannot merge .*lora_bias[^\n]*$"):
        update_of(folders[False], path)


def test_an_adapter_has_peft_ask_nobody_for_the_base_that_it_names(folders, tmp_path, monkeypatch):
    path = adapter(folders[False], tmp_path / "theirs", **LORA, target_modules=["q_proj"])
    spoilt(path, base_model_name_or_path="somebody/else")
    asked = []
    monkeypatch.setattr(
        "peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *names: asked.append(names)
    )
    assert update_of(folders[False], path).deltas
    assert asked == []


def test_an_adapter_may_be_named_as_the_hub_has_it(folders, tmp_path, monkeypatch):
    """Only what an adapter is made of is fetched, and only where the name is no folder here."""
    path = adapter(folders[False], tmp_path / "theirs", **LORA, target_modules=["q_proj"])
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    assert foreign.identify(str(path), "any") == path
    assert asked == []
    assert foreign.identify("somebody/adapter", "any") == path
    assert asked == [
        (
            "somebody/adapter",
            ["adapter_config.json", "adapter_model.safetensors", "super_adapter/*"],
        )
    ]
    assert foreign.name_of("somebody/adapter") == "adapter"
    assert foreign.name_of("runs/mine/super_adapter") == "mine"
    for name in ("nowhere", "./some/where", "a/b/c", str(tmp_path / "x")):
        with pytest.raises(RunError, match=r"no such directory; .* \(owner/name\)"):
            foreign.identify(name, "any")
    assert len(asked) == 1


def test_an_adapter_that_the_hub_does_not_give_is_named():
    with pytest.raises(ModelError, match="merge: 'somebody/adapter': neither a folder nor on"):
        foreign.identify("somebody/adapter", "any")


def test_a_class_that_looks_at_its_ties_computes_the_same(tmp_path):
    """Switch Transformers scale what a tied head reads, whatever an adapter is on."""
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=tiny.VOCABULARY, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        num_decoder_layers=2, num_experts=2, num_sparse_encoder_layers=0,
        num_sparse_decoder_layers=0, pad_token_id=tiny.PAD, eos_token_id=tiny.EOS,
        decoder_start_token_id=tiny.PAD, tie_word_embeddings=True,
    )  # fmt: skip
    model = SwitchTransformersForConditionalGeneration(config)
    model.save_pretrained(tmp_path / "switch")
    tiny.tokenizer().save_pretrained(tmp_path / "switch")
    path = adapter(tmp_path / "switch", tmp_path / "theirs", **LORA, target_modules=["q", "v"])
    update = foreign.read(path, base_of(tmp_path / "switch"), "any", [tokens(1).numpy()])
    assert update.deltas
