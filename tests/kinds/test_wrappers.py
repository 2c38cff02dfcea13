"""Models that read images beside text: cut in their language model alone, and written whole."""

from __future__ import annotations

import copy
import random

import pytest
import torch
import transformers
from safetensors import safe_open

import elastic
from elastic.config import (
    CompensationConfig,
    ExportConfig,
    HfConfig,
    ModelConfig,
    SearchConfig,
    SpaceShowConfig,
    StageConfig,
)
from elastic.errors import ConfigError, ExportError, ModelError
from elastic.exporting.command import export
from elastic.files import read_json
from elastic.formats import hf, slices
from elastic.formats.runner import runner_of
from elastic.formats.text_only import as_text, text_only
from elastic.latency import bench
from elastic.models import loading
from elastic.models.kinds import Kind, kind_of, learnt_positions
from elastic.models.modules import modules_of
from elastic.models.quantised import QuantisedLinear
from elastic.models.wrappers import is_in, language_model, outside
from elastic.searching.study import search
from elastic.spaces.bound import SubAdapter
from elastic.spaces.declared import SearchSpace
from elastic.supernet.compact import compact
from elastic.supernet.cost import count
from elastic.supernet.discovery import declared_for, require_fits
from elastic.supernet.supernet import Supernet
from elastic.supernet.wrapped import placed
from elastic.training.dry_run import estimate
from elastic.training.one_task import train_one
from tests.helpers import tiny, wrappers
from tests.helpers.clock import drive
from tests.helpers.laws import close, one_function, same, several, without_data
from tests.helpers.tiny_runs import ONE_ROUND, fake_measure, randomize_factors, train_config
from tests.helpers.wrappers import WRAPPERS, features, logits, seen

QUICK = ("gemma3", "mistral3", "qwen2-vl")
"""Every kind of language model that is unlike the others; `slow` has all."""


def each(quick=QUICK):
    """All of them, and which are asked every time."""
    marks = {name: () if name in quick else pytest.mark.slow for name in WRAPPERS}
    return pytest.mark.parametrize("name", [pytest.param(n, marks=m) for n, m in marks.items()])


ROUNDED = {"gemma3"}
"""Whose code rounds to float32 somewhere, whatever the type."""


def declared(name: str) -> SearchSpace:
    """All that the language model can lose, by the names that it has alone."""
    space = tiny.space_dict()
    space["groups"]["depth"] = {"dim": "depth", "choices": [3, 2]}
    space["groups"]["vocab"] = {"dim": "vocab", "choices": [1.0, 0.5]}
    if name not in ("qwen2-vl", "qwen2.5-vl"):  # whose attention counts on its heads
        space["groups"]["query_heads"] = {
            "dim": "query_heads", "outputs": ["self_attn.q_proj"], "inputs": ["self_attn.o_proj"],
            "choices": [2, 1],
        }  # fmt: skip
    return SearchSpace.from_dict(space)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """One of each, saved when it is asked for."""
    root = tmp_path_factory.mktemp("wrappers")

    class Folders(dict):
        def __missing__(self, name):
            self[name] = wrappers.save(name, root / name)
            return self[name]

    return Folders()


def net_of(model, name: str) -> Supernet:
    """Its channels in another order, its factors moved."""
    net = Supernet(model, placed(declared(name), model), tiny.ADAPTERS["lora"])
    order = tiny.permutations(net)
    for group in net.space:
        if group.staying:  # the first and the last block stay
            order[group.name] = torch.tensor([0, 2, 1])
        if group.name in order and any(cut.apart for cut in group.cuts):
            order[group.name] = torch.stack([order[group.name], order[group.name].flip(0)])
    net.reorder(order)
    return tiny.randomize_(net)


def mixed(net: Supernet) -> SubAdapter:
    """With layers of unlike sizes, and all tokens."""
    draws = (net.space.random(random.Random(seed)) for seed in range(20))
    whole = (net.space.with_whole_vocabulary(sub) for sub in draws)
    return next(sub for sub in whole if not hf.is_plain(compact(net, sub)))


def kept_of(model) -> torch.Tensor:
    """Tokens that a model has logits for."""
    return logits(model)[0, 0].isfinite().nonzero()[:, 0]


def uniform(net: Supernet) -> SubAdapter:
    """With narrow layers of one size."""
    last = {group.name: group.choices[-1 if group.dim == "width" else 0] for group in net.space}
    return SubAdapter(tuple(last.items()))


@each()
def test_active_sliced_and_merged_are_one_function_of_text_and_of_pictures(name, folders):
    model = wrappers.load(folders[name])
    assert kind_of(model) is Kind.DECODER and type(model).__name__.endswith("Generation")
    before, picture = copy.deepcopy(model.state_dict()), features(model)
    net, precision = net_of(model, name), 1e-5 if name in ROUNDED else 1e-10
    elsewhere = outside(model)
    assert elsewhere and not any(is_in(site, elsewhere) for site in net.space.targets)
    for sub in several(net, draws=1)[1:]:
        _, small = one_function(net, sub, logits, precision)
        with net.active(sub) as active:
            close(seen(small)[..., kept_of(small)], seen(active)[..., kept_of(small)], precision)
        assert torch.equal(features(small), picture)
        kept = [key for key in before if is_in(key, elsewhere)]
        assert kept and all(torch.equal(small.state_dict()[key], before[key]) for key in kept)
        assert count(small).macs == count(as_text(small)).macs


@each()
@pytest.mark.parametrize("plain", [True, False])
def test_written_whole_and_loaded_with_transformers_it_is_the_same(name, plain, folders, tmp_path):
    base = wrappers.load(folders[name])
    net = net_of(wrappers.load(folders[name]), name)
    small = compact(net, uniform(net) if plain else mixed(net))
    folder = hf.write(small, tiny.tokenizer(), tmp_path)
    assert (folder / hf.CODE).exists() is not plain
    again = transformers.AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float64, trust_remote_code=not plain
    ).eval()
    assert torch.equal(logits(again), logits(small)) and torch.equal(seen(again), seen(small))
    assert torch.equal(features(again), features(base))
    config = ModelConfig(path=str(folder), dtype="float64", trust_remote_code=not plain)
    as_base = loading.load_model(str(folder), config)  # to be cut once more
    assert type(as_base) is type(base) and torch.equal(seen(as_base), seen(small))
    elsewhere = outside(base)
    for key, tensor in base.state_dict().items():
        if is_in(key, elsewhere):
            assert torch.equal(again.state_dict()[key], tensor), key
    if plain:
        with (
            safe_open(folders[name] / "model.safetensors", "pt") as before,
            safe_open(folder / "model.safetensors", "pt") as after,
        ):
            assert set(before.keys()) == set(after.keys())
    processor = read_json(folder / "processor_config.json")
    assert processor == {"image_seq_length": 4}  # without the name of a stranger's code
    assert read_json(folder / "preprocessor_config.json") == {"size": 8}
    assert "messages" in (folder / "chat_template.jinja").read_text()


@each(("gemma3", "qwen2-vl", "qwen3-vl"))
def test_the_language_model_alone_computes_the_same_of_text(name, folders, tmp_path):
    net = net_of(wrappers.load(folders[name]), name)
    classes = {"gemma3": "Gemma3", "mistral3": "Mistral", "qwen3-vl": "Qwen3", "llava": "Llama"}
    for number, sub in enumerate((mixed(net), net.space.minimal())):  # the last with fewer tokens
        small = compact(net, sub)
        text = text_only(small)
        assert type(text).__name__ == f"{classes.get(name, 'Qwen2')}ForCausalLM"
        assert torch.equal(logits(text), logits(small))
        folder = hf.write(text, tiny.tokenizer(), tmp_path / str(number))
        again = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, trust_remote_code=True
        )
        assert torch.equal(logits(again.eval()), logits(small))
        assert not (folder / "processor_config.json").exists()
        gone = sum(p.numel() for key, p in small.named_parameters() if is_in(key, outside(small)))
        assert count(small).params - count(text).params == gone > 0


def test_of_a_model_made_in_memory_no_processor_is_looked_for(folders, tmp_path, monkeypatch):
    monkeypatch.chdir(folders["llava"])  # where there is one, of another model
    folder = hf.write(wrappers.whole("llava"), None, tmp_path)
    assert not list(folder.glob("*processor*"))


def test_a_language_model_that_is_another_function_alone_is_refused():
    """The class of Gemma 3's text bends its logits where the whole class does not."""
    with pytest.raises(ExportError, match=r"Gemma3ForCausalLM computes something else of text"):
        text_only(wrappers.whole("gemma3", final_logit_softcapping=2.0))


def test_tensor_by_tensor_it_is_the_same_model(folders):
    base = wrappers.load(folders["mistral3"])
    net = net_of(wrappers.load(folders["mistral3"]), "mistral3")
    bare = without_data(base, net, net.declared, "lora", net.order)
    same(base, net, bare)


def test_a_generated_batch_leaves_no_positions_behind(folders):
    """Qwen-VL's classes keep some for as many rows as there were."""
    model = wrappers.load(folders["qwen2-vl"])
    ids = tiny.tokens(1, 5)
    expected = drive(runner_of(model), ids.numpy(), 3)
    model.generate(tiny.tokens(4, 5), max_new_tokens=2, do_sample=False)
    close(torch.tensor(drive(runner_of(model), ids.numpy(), 3)), torch.tensor(expected))


@each(("gemma3", "llava"))
def test_what_is_found_lies_in_the_language_model(name, folders):
    """By structure or by a shipped space for its type, which has other names."""
    config = ModelConfig(path=str(folders[name]), device="cpu")
    skeleton = loading.skeleton(config)
    space = declared_for(SpaceShowConfig(space="auto", model=config))
    assert [section.blocks for section in space.sections] == ["model.language_model.layers.*"]
    assert (space.source == "llama.yaml") is (name in ("mistral3", "llava"))
    require_fits(skeleton, space, 4)
    assert language_model(skeleton) == "model.language_model"
    assert learnt_positions(skeleton) is None  # the vision tower has a table of them


def test_a_model_in_memory_is_searched_and_saved_whole(folders, tmp_path):
    model = wrappers.load(folders["qwen3-vl"], "float32")
    net = elastic.attach(model, space="llama-deep", max_rank=4)
    front = net.search(accuracy=lambda small: -float(count(small).macs), latency="params", trials=2)
    small = net.compact(front.best)
    elastic.save_compact(small, tmp_path)
    again = hf.load(tmp_path, torch.float32)
    assert torch.equal(seen(again), seen(small))
    assert (tmp_path / "processor_config.json").exists()


def test_a_space_outside_of_the_language_model_is_refused(folders):
    skeleton = loading.skeleton(ModelConfig(path=str(folders["llava"]), device="cpu"))
    space = SearchSpace.from_dict({
        "blocks": "model.vision_tower.encoder.layers.*", "adapt": ["mlp.fc1"],
        "groups": {"rank": {"dim": "rank", "of": ["mlp.fc1"], "choices": [1.0]}},
    })  # fmt: skip
    with pytest.raises(ConfigError, match=r"fc1 is outside of the language model of Llava"):
        require_fits(skeleton, space, 4)


def test_a_class_that_wants_more_than_text_is_refused(tmp_path):
    layers = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
              "num_attention_heads": 4}  # fmt: skip
    text = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
            "word_embed_proj_dim": 32, "vocab_size": tiny.VOCABULARY}  # fmt: skip
    config = transformers.Blip2Config(vision_config={**layers, "image_size": 8, "patch_size": 4},
                                      qformer_config={**layers, "encoder_hidden_size": 32},
                                      text_config={"model_type": "opt", **text})  # fmt: skip
    config.architectures = ["Blip2ForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    model = loading.skeleton(ModelConfig(path=str(tmp_path), device="cpu"))
    space = placed(SearchSpace.load("opt"), model)
    with pytest.raises(ConfigError, match="on text alone: it wants pixel_values, too"):
        require_fits(model, space, 4)


def test_a_classification_head_is_refused(folders):
    config = ModelConfig(path=str(folders["llava"]), head="classification", classes=["a", "b"])
    with pytest.raises(ModelError, match="reads more than text"):
        loading.load_model(config.path, config)


def test_a_class_that_transformers_cannot_run_is_loaded_as_its_language_model(tmp_path, capsys):
    text = {**wrappers.TEXT, "head_dim": 8, "intermediate_size_mlp": 64, "moe_layers": []}
    tower = {**wrappers.TOWER, "vision_output_dim": 16, "projector_input_dim": 16,
             "projector_output_dim": 16}  # fmt: skip
    kind = transformers.Llama4ForConditionalGeneration
    whole = kind(transformers.Llama4Config(text_config=text, vision_config=tower)).eval()
    whole.save_pretrained(tmp_path)
    with pytest.raises(AttributeError, match="image_outputs"):
        whole(input_ids=tiny.tokens())  # else it is time to load it whole
    model = wrappers.load(tmp_path, "float32")
    assert "cannot run Llama4ForConditionalGeneration" in capsys.readouterr().err
    assert type(model).__name__ == "Llama4ForCausalLM"
    assert torch.equal(logits(model), logits(whole.language_model))


def test_a_dry_run_knows_its_parameters_and_its_packed_weights(folders, tmp_path):
    config = ModelConfig(path=str(folders["gemma3"]), quantise="nf4", dtype="float32", device="cpu")
    told = estimate(train_config(folders["gemma3"], tmp_path / "run", model=config, space="auto"))
    model = loading.load_model(config.path, config)
    assert told.parameters == count(model).params
    held = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    assert told.memory.base == sum(tensor.nbytes for tensor in held.values())


def test_a_quantised_base_has_the_rest_as_it_was(folders):
    pytest.importorskip("bitsandbytes")
    base = wrappers.load(folders["gemma3"], "float32")
    config = ModelConfig(path=str(folders["gemma3"]), quantise="nf4", dtype="float32", device="cpu")
    model = loading.load_model(config.path, config)
    packed = [name for name, _ in modules_of(model, QuantisedLinear)]
    assert len(packed) == 7 * 3
    assert all(name.startswith("model.language_model.layers.") for name in packed)
    assert torch.equal(features(model), features(base))


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    """Trained and searched by the commands, by a space that names the blocks of a language model of
    its own."""
    root = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "measure", fake_measure)
        patch.setenv("ELASTIC_CACHE", str(root / "cache"))
        stages = [StageConfig(), StageConfig(train_dims=["rank", "width", "depth", "query_heads"])]
        space = declared("gemma3").as_dict()
        space["groups"].pop("vocab")
        file = root / "space.yaml"
        file.write_text(tiny_yaml(space))
        run = train_one(
            train_config(folders["gemma3"], root / "run", space=str(file), stages=stages)
        )
        randomize_factors(run)
        search(SearchConfig(run=str(run.path), trials=4, starts=3, timing=ONE_ROUND, test_front=1))
        yield run


def tiny_yaml(space) -> str:
    import yaml

    return yaml.safe_dump(space)


def exported(run, **settings):
    report = export(ExportConfig(run=str(run.path), timing=ONE_ROUND, weigh=False,
                                 runtime_examples=0, **settings))  # fmt: skip
    return report, report.contents["formats"]


def test_the_commands_train_search_and_write_it(run, folders):
    """As one model, and in every size that the search found; the sizes with transformers alone."""
    report, formats = exported(run, sub_adapter="heuristic", formats=["hf", "elastic"])
    assert all(about["max_abs_diff"] < 1e-4 for about in formats.values())
    base = wrappers.load(folders["gemma3"], "float32")
    small = hf.load(report.directory / "hf", torch.float32)
    assert torch.equal(features(small), features(base))
    assert not torch.equal(seen(small), seen(base))
    card = (report.directory / "hf" / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card and "type: text-generation" in card
    assert "import AutoModelForImageTextToText" in card and "what it makes of pictures" in card
    every = report.directory / "elastic"
    name = next(name for name in slices.read(every)["slices"] if name != "full")
    one = elastic.load(every, slice=name)
    assert one.model.config is one.config
    assert one.model.language_model.config is one.config.text_config
    alone = transformers.AutoModelForImageTextToText.from_pretrained(
        every, trust_remote_code=True, slice=name
    )
    resized = elastic.load(every, resizable=True, slice=name)
    assert torch.equal(logits(alone), logits(one)) and torch.equal(seen(alone), seen(one))
    close(seen(resized), seen(one), 1e-5)
    assert torch.equal(features(one), features(base))


def test_the_language_model_is_written_alone_where_that_is_asked_for(run):
    report, formats = exported(
        run, sub_adapter="heuristic", name="text", formats=["hf"], hf=HfConfig(text_only=True)
    )
    assert formats["hf"]["text_only"] and formats["hf"]["greedy_tokens_equal"]
    text = hf.load(report.directory / "hf", torch.float32)
    assert type(text).__name__ == "Gemma3ForCausalLM"


def test_it_is_written_tensor_by_tensor(run):
    """Also what makes up for what is cut."""
    settings = {"sub_adapter": "minimal", "formats": ["hf"]}
    made_up = CompensationConfig(degrees=[0.5], sequential=False)
    whole, _ = exported(run, **settings, name="proved", compensation=made_up)
    streamed, _ = exported(run, **settings, name="streamed", compensation=made_up, prove=False)
    one, other = (hf.load(each.directory / "hf", torch.float32) for each in (whole, streamed))
    assert torch.equal(seen(one), seen(other))


def test_the_language_model_of_a_model_of_text_is_not_asked_for(trained):
    with pytest.raises(ConfigError, match="is loaded as a model of text"):
        exported(trained, formats=["hf"], hf=HfConfig(text_only=True))
