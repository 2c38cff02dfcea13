"""A quantised base computes what its dequantised twin computes, without ever being it."""

import json
import sys
import typing

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from elastic.config import (
    CompensationConfig,
    ExportConfig,
    MergeAdapterConfig,
    MergeConfig,
    ModelConfig,
    SearchConfig,
    TableConfig,
)
from elastic.errors import ConfigError, MissingExtra, ModelError
from elastic.exporting import foreign
from elastic.exporting.command import export
from elastic.exporting.foreign import Update
from elastic.exporting.merge import combine
from elastic.formats import hf
from elastic.models import loading, quantised
from elastic.models.digest import digest_of
from elastic.models.modules import dequantise_, modules_of
from elastic.models.quantised import DEQUANTISE, QuantisedLinear
from elastic.searching.study import search
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compact import compact, sliced
from elastic.supernet.cost import Counter, count
from elastic.supernet.importance import channel_order
from elastic.supernet.store import load_run, load_super_adapter, save_super_adapter
from elastic.supernet.supernet import Supernet
from elastic.training.one_task import train_one
from tests.helpers import tiny
from tests.helpers.laws import MERGED, close, several, some_moments
from tests.helpers.seq2seq import SPACE as T5_SPACE
from tests.helpers.tiny import logits, tokens
from tests.helpers.tiny_runs import (
    ONE_ROUND,
    assert_same_factors,
    interrupted,
    move_factors,
    train_config,
)

pytest.importorskip("bitsandbytes")

CPU = torch.device("cpu")
KINDS = sorted(DEQUANTISE)
BIASED = {"attention_bias": True, "mlp_bias": True}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A saved tiny model with biases, so that they too must follow the channels."""
    folder = tmp_path_factory.mktemp("biased")
    tiny.llama(dtype=torch.float32, **BIASED).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def config_of(folder, kind: str, **settings) -> ModelConfig:
    settings = {"dtype": "float32", "device": "cpu"} | settings
    return ModelConfig(path=str(folder), quantise=kind, **settings)


def wide_base(folder, kind: str):
    """The quantised model computing in float64, in which laws show to the last digits."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, **quantised.loading(kind, torch.float32, CPU)
    )
    model = quantised.adopt_(model, torch.float64)
    return tiny.wide_norms_(model.eval().requires_grad_(False))


def twins(folder, kind: str, method: str = "lora", *, heads: bool = True):
    """Supernets on the quantised model and on its dequantised twin, alike in all else."""
    nets = []
    for base in (wide_base(folder, kind), dequantise_(wide_base(folder, kind))):
        net = tiny.supernet(method, heads=heads, base=base)
        net.reorder(tiny.permutations(net))
        nets.append(net)
    packed, dense = nets
    assert any(modules_of(packed.model, QuantisedLinear))
    assert not any(modules_of(dense.model, QuantisedLinear))
    return packed, dense


def gradients(net, sub) -> dict[str, torch.Tensor]:
    with net.active(sub) as model:
        model(input_ids=tokens(), labels=tokens(), use_cache=False).loss.backward()
    found = {n: p.grad for n, p in net.model.named_parameters() if p.grad is not None}
    net.model.zero_grad()
    return found


@pytest.fixture
def formed(monkeypatch):
    """The storage of every dense weight that is formed."""
    from torch.multiprocessing.reductions import StorageWeakRef

    storages = []

    def spied(dequantise):
        def remembered(*args):
            weight = dequantise(*args)
            storages.append(StorageWeakRef(weight.untyped_storage()))
            return weight

        return remembered

    for kind, dequantise in list(DEQUANTISE.items()):
        monkeypatch.setitem(DEQUANTISE, kind, spied(dequantise))
    return storages


# One function.


def test_the_kinds_are_those_of_the_configuration():
    kinds = typing.get_args(typing.get_type_hints(ModelConfig)["quantise"])
    assert set(kinds) == {"none", *DEQUANTISE}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_cut_is_made_up_for_as_in_the_dequantised_twin(folder, kind):
    packed, dense = twins(folder, kind)
    packed.compensation = dense.compensation = some_moments(dense)
    sub = packed.space.minimal()
    with dense.active(sub, 0.5) as model:
        expected = logits(model, tokens())
    with packed.active(sub, 0.5) as model:
        close(logits(model, tokens()), expected)
    with packed.active(sub) as model:
        assert not torch.allclose(logits(model, tokens()), expected, atol=1e-3)
    close(logits(compact(packed, sub, 0.5), tokens()), expected, MERGED)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_those_that_transformers_dequantises(folder, kind):
    mine = loading.load_model(str(folder), config_of(folder, kind))
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, **quantised.loading(kind, torch.float32, CPU)
    ).dequantize()
    packed = dict(modules_of(mine, QuantisedLinear))
    plain = {name for name, _ in modules_of(mine, torch.nn.Linear)} - set(packed)
    assert len(packed) == 14 and plain == {"lm_head"}
    original = tiny.llama(dtype=torch.float32, **BIASED)
    for name, layer in packed.items():
        assert torch.equal(layer.weight, theirs.get_submodule(name).weight), name
        assert torch.equal(layer.bias, theirs.get_submodule(name).bias), name
        assert not torch.equal(layer.weight, original.get_submodule(name).weight), name


@pytest.mark.parametrize("method", tiny.ADAPTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_active_sliced_and_merged_are_those_of_the_dense_twin(folder, kind, method):
    packed, dense = twins(folder, kind, method)
    outputs = []
    for sub in several(packed):
        with packed.active(sub), dense.active(sub):
            expected = logits(dense.model, tokens())
            close(logits(packed.model, tokens()), expected)
        small, plain = sliced(packed, sub), compact(packed, sub)
        close(logits(small, tokens()), expected)
        close(logits(plain, tokens()), expected, MERGED)
        theirs = compact(dense, sub).state_dict()
        assert plain.state_dict().keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[n]) for n, tensor in plain.state_dict().items())
        outputs.append(expected)
    assert not torch.allclose(outputs[0], outputs[1]), "maximal and minimal must differ"


@pytest.mark.parametrize("method", tiny.ADAPTERS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_dense_twin(folder, kind, method):
    packed, dense = twins(folder, kind, method)
    for sub in (packed.space.maximal(), packed.space.heuristic(), packed.space.minimal()):
        mine, theirs = gradients(packed, sub), gradients(dense, sub)
        assert mine.keys() == theirs.keys() and mine
        assert max(gradient.abs().max() for gradient in mine.values()) > 0.1
        for name, gradient in theirs.items():
            torch.testing.assert_close(mine[name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("heads", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_no_dense_weight_outlives_its_use(folder, formed, kind, heads):
    """With `heads` the output projection is elastic without factors, else not elastic at all."""
    net, _ = twins(folder, kind, heads=heads)
    formed.clear()
    with net.active(net.space.heuristic()) as model:
        saved = {}

        def keep(tensor):
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(input_ids=tokens(), labels=tokens(), use_cache=False).loss
        assert len(formed) == 14 and all(storage.expired() for storage in formed)
        loss.backward()
        # Nothing asks for the gradient of the embeddings, which enter q, k and v of the first.
        assert len(formed) == 14 + 11 and all(storage.expired() for storage in formed)
    assert saved


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_autocast_is_that_of_the_dense_twin(folder, kind, narrow):
    found = []
    for net in twins(folder, kind, heads=False):
        net.model.float()
        for _, layer in modules_of(net.model, QuantisedLinear):
            layer.dtype = torch.float32
        with torch.autocast("cpu", narrow):
            output = net.model(input_ids=tokens(), labels=tokens(), use_cache=False)
        output.loss.backward()
        found.append((output.logits.detach(), net.layer("model.layers.0.mlp.up_proj").adapter.A))
    (mine, A), (theirs, expected) = found
    assert mine.dtype == narrow and torch.equal(mine, theirs)
    assert A.grad.dtype == torch.float32 and expected.grad.abs().max() > 1e-3
    torch.testing.assert_close(A.grad, expected.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_codes_do_not_depend_on_the_type_computed_in(tmp_path, kind, stored):
    """What is trained in bfloat16 and exported in float32 is one model."""
    folder = tiny.save_tiny(tmp_path / "tiny", dtype=stored)
    one, other = (
        loading.load_model(str(folder), config_of(folder, kind, dtype=dtype))
        for dtype in ("bfloat16", "float32")
    )
    assert {p.dtype for p in one.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in other.parameters()} == {torch.float32}
    for name, layer in modules_of(one, QuantisedLinear):
        wide = other.get_submodule(name)
        assert torch.equal(layer.codes, wide.codes) and torch.equal(layer.scales, wide.scales)
        assert torch.equal(layer.weight, wide.weight.bfloat16())


# Beside the function.


@pytest.mark.parametrize(("kind", "bits"), [("nf4", 4 + 32 / 64), ("int8", 8 + 32 / 32)])
def test_memory_is_a_few_bits_per_weight(folder, kind, bits):
    layer = loading.load_model(str(folder), config_of(folder, kind)).model.layers[0].mlp.up_proj
    held = [*layer.parameters(), *layer.buffers()]
    assert sum(t.nbytes for t in held) - layer.bias.nbytes == bits / 8 * 64 * 32


@pytest.mark.parametrize("kind", KINDS)
def test_counting_sees_weights_not_codes(folder, kind):
    net, _ = twins(folder, kind)
    plain = tiny.llama(**BIASED)
    counter = Counter(net.model, net.space)
    assert counter.full == count(wide_base(folder, kind)) == count(plain)
    for sub in several(net):
        assert counter(sub) == count(compact(net, sub))


@pytest.mark.parametrize("mode", ["activation", "norm"])
@pytest.mark.parametrize("kind", KINDS)
def test_importance_is_that_of_the_dense_twin(folder, kind, mode):
    base, twin = wide_base(folder, kind), dequantise_(wide_base(folder, kind))
    space, batches = tiny.space(heads=True).bind(base, tiny.RANK), [{"input_ids": tokens()}]
    mine, theirs = (channel_order(model, space, mode, batches) for model in (base, twin))
    plain = channel_order(tiny.llama(**BIASED), space, mode, batches)
    assert all(torch.equal(order, theirs[name]) for name, order in mine.items())
    assert any(not torch.equal(order, plain[name]) for name, order in mine.items())


@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded_is_the_same(folder, tmp_path, kind):
    net, _ = twins(folder, kind)
    save_super_adapter(net, tmp_path / "net", model=config_of(folder, kind), base_digest="sha256:")
    again = load_super_adapter(wide_base(folder, kind), "sha256:", tmp_path / "net")
    about = json.loads((tmp_path / "net" / "about.json").read_text())
    assert about["quantise"] == kind
    for sub in several(net):
        with net.active(sub), again.active(sub):
            assert torch.equal(logits(net.model, tokens()), logits(again.model, tokens()))


@pytest.mark.parametrize("kind", KINDS)
def test_the_digest_is_that_of_the_files(folder, kind):
    assert loading.load(config_of(folder, kind)).digest == digest_of(folder)


@pytest.mark.parametrize("heads", [False, True])
def test_other_adapters_merge_as_into_the_dense_twin(folder, heads):
    """Without `heads` the output projection is quantised and not elastic."""
    packed, dense = twins(folder, "nf4", heads=heads)
    generator = torch.Generator().manual_seed(1)
    deltas = {
        f"model.layers.1.{site}.weight": torch.randn(*shape, generator=generator).double()
        for site, shape in (("self_attn.o_proj", (32, 32)), ("mlp.up_proj", (64, 32)))
    }
    merge = MergeConfig(adapters=[MergeAdapterConfig(path="other")])
    for sub in (packed.space.maximal(), packed.space.heuristic()):
        mine, theirs = (
            combine(net, sub, [Update("other", "lora", deltas)], merge) for net in (packed, dense)
        )
        close(logits(mine[0], tokens()), logits(theirs[0], tokens()))
        assert mine[1] == theirs[1]
        assert not torch.allclose(logits(mine[0], tokens()), logits(compact(packed, sub), tokens()))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft 0.21
def test_a_peft_adapter_is_read_as_without_quantisation(tiny_folder, tmp_path):
    adapted = get_peft_model(
        loading.load_model(str(tiny_folder), config_of(tiny_folder, "none")),
        LoraConfig(r=3, target_modules=["q_proj", "up_proj"], init_lora_weights=False),
    )
    adapted.save_pretrained(tmp_path / "peft")
    configs = (config_of(tiny_folder, kind) for kind in ("nf4", "none"))
    mine, plain = (foreign.read(tmp_path / "peft", config, "") for config in configs)
    assert len(mine.deltas) == 4 and mine.deltas.keys() == plain.deltas.keys()
    assert all(torch.equal(delta, plain.deltas[name]) for name, delta in mine.deltas.items())


@pytest.mark.parametrize("kind", KINDS)
def test_an_encoder_decoder_model_is_its_dense_twin(tmp_path, kind):
    folder = tiny.save_t5(tmp_path / "t5")
    nets = []
    for make in (lambda model: model, dequantise_):
        base = make(loading.load_model(str(folder), config_of(folder, kind)))
        net = Supernet(base, SearchSpace.from_dict(T5_SPACE), tiny.ADAPTERS["lora"])
        net.reorder(tiny.permutations(net))
        nets.append(tiny.randomize_(net))
    packed, dense = nets
    assert any(modules_of(packed.model, QuantisedLinear))
    inputs = {"input_ids": tokens(), "labels": tokens(2, 5, seed=1), "use_cache": False}
    for sub in several(packed):
        with packed.active(sub), dense.active(sub):
            expected = dense.model(**inputs).logits.detach()
            close(packed.model(**inputs).logits.detach(), expected, 1e-5)
            close(sliced(packed, sub)(**inputs).logits.detach(), expected, 1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_parameters_have_the_types_of_a_base_that_is_not_quantised(tmp_path, dtype):
    """T5 keeps float32 layers beside float16 ones."""
    folder = tiny.save_t5(tmp_path / "t5")
    packed, plain = (
        loading.load_model(str(folder), config_of(folder, kind, dtype=dtype))
        for kind in ("nf4", "none")
    )
    types = {name: parameter.dtype for name, parameter in plain.named_parameters()}
    for name, parameter in packed.named_parameters():
        assert parameter.dtype == types[name], name
    for name, layer in modules_of(packed, QuantisedLinear):
        assert layer.weight.dtype == types[f"{name}.weight"], name


# A whole run.


@pytest.fixture(scope="module", params=KINDS)
def run(request, tiny_folder, tmp_path_factory):
    kind = request.param
    config = train_config(
        tiny_folder,
        tmp_path_factory.mktemp(kind) / "run",
        model=config_of(tiny_folder, kind, dtype="bfloat16"),
        accumulation=2,
        gradient_checkpointing=True,
    )
    found = train_one(config)
    move_factors(found)
    return found


def test_a_killed_run_ends_like_one_that_was_not(tiny_folder, tmp_path, monkeypatch):
    settings = {"model": config_of(tiny_folder, "nf4"), "accumulation": 2, "save_steps": 1}
    whole = train_one(train_config(tiny_folder, tmp_path / "whole", **settings))
    config = train_config(tiny_folder, tmp_path / "killed", **settings)
    run = interrupted(config, monkeypatch, 3)
    assert not run.super_adapter.exists()
    train_one(config)
    assert_same_factors(run, whole)
    other = train_one(
        train_config(tiny_folder, tmp_path / "dense", **settings | {"model": _dense(tiny_folder)})
    )
    with pytest.raises(AssertionError):
        assert_same_factors(other, whole)


def _dense(folder) -> ModelConfig:
    return config_of(folder, "none")


def test_an_exported_run_is_the_supernet(run):
    """Trained in bfloat16 with what saves memory, exported in float32; the command itself
    compares what it wrote with the supernet."""
    report = export(
        ExportConfig(
            run=str(run.path),
            sub_adapter="heuristic",
            formats=["hf"],
            timing=ONE_ROUND,
            compensation=CompensationConfig(degrees=[0.0]),
        )
    )
    loaded = hf.load(report.directory / "hf", torch.float32)
    config, _, net = load_run(run, dtype="float32")
    assert config.model.quantise in KINDS
    sub = net.space.heuristic()
    with net.active(sub) as model:
        expected = logits(model, tokens())
    close(logits(loaded, tokens()), expected, 1e-5)
    assert not any(modules_of(loaded, QuantisedLinear))
    assert "quant" not in (report.directory / "hf" / "config.json").read_text()


def test_an_exported_lora_is_for_the_quantised_base(run):
    report = export(
        ExportConfig(run=str(run.path), sub_adapter="maximal", formats=["peft"], timing=ONE_ROUND)
    )
    assert report.contents["formats"]["peft"]["greedy_tokens_equal"]


def test_a_search_scores_the_dequantised_model(run):
    front = search(SearchConfig(run=str(run.path), trials=3, starts=2, timing=ONE_ROUND,
                                table=TableConfig(seen=4, unseen=0)))  # fmt: skip
    config, _, net = load_run(run)
    full = compact(net, net.space.maximal())
    assert front.full.params == count(full).params
    assert not any(modules_of(full, QuantisedLinear)) and full.dtype == torch.bfloat16
    assert config.model.quantise in KINDS


# What is refused, before weights load.


@pytest.fixture
def no_weights(monkeypatch):
    def from_pretrained(*_, **__):
        pytest.fail("weights were loaded")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)


def test_nothing_to_gain_from_float64(no_weights):
    with pytest.raises(ConfigError, match=r"nf4 with model\.dtype float64.*choose float32"):
        ModelConfig(quantise="nf4", dtype="float64")


def test_a_missing_library_names_its_extra(tiny_folder, tmp_path, monkeypatch, no_weights):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    config = config_of(tiny_folder, "int8")
    with pytest.raises(MissingExtra, match=r"quantise int8 needs bitsandbytes.*\[quantised\]"):
        loading.load_model(str(tiny_folder), config)
    with pytest.raises(MissingExtra):
        train_one(train_config(tiny_folder, tmp_path / "run", model=config))
    assert not (tmp_path / "run").exists()


def test_a_base_that_is_packed_already_is_refused(tmp_path, tiny_folder, no_weights):
    folder = tiny.save_tiny(tmp_path / "packed")
    file = folder / "config.json"
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": packed}))
    for kind in ("none", "nf4"):
        with pytest.raises(ModelError, match=r"quantised already; give the original weights"):
            train_one(train_config(folder, tmp_path / "run", model=config_of(folder, kind)))
    assert not (tmp_path / "run").exists()
