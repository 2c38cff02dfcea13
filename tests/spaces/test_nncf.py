"""What LoNAS and Shears published for NNCF is read into our spaces, stages and searches."""

import functools
import json
import operator

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from elastic import __main__
from elastic.config import ModelConfig, SearchConfig, TrainConfig
from elastic.config.parsing import from_dict
from elastic.errors import ConfigError
from elastic.models import loading
from elastic.spaces.declared import SearchSpace
from elastic.spaces.nncf import read
from tests.helpers.tiny_runs import space_file

LLAMA = ("PeftModelForCausalLM/LoraModel[base_model]/LlamaForCausalLM[model]/LlamaModel[model]/"
         "ModuleList[layers]/LlamaDecoderLayer[{}]/")  # fmt: skip
BERT = ("PeftModelForSequenceClassification/LoraModel[base_model]/"
        "BertForSequenceClassification[model]/BertModel[bert]/BertEncoder[encoder]/"
        "ModuleList[layer]/BertLayer[{}]/")  # fmt: skip
FACTOR_A = "ModuleDict[lora_A]/NNCFLinear[default]/linear_0"
FACTOR_B = "ModuleDict[lora_B]/NNCFLinear[default]/linear_0"
WHOLE = "NNCFUserSelfLinear[self_linear]/linear_0"


def configuration(groups, widths, stage=None, search=None, **width) -> dict:
    stage = {"train_dims": ["width"], "epochs": 7, "depth_indicator": 1, "width_indicator": 5,
             "init_lr": 3e-4, "epochs_lr": 7, "sample_rate": 1, **(stage or {})}  # fmt: skip
    training = {
        "algorithm": "progressive_shrinking",
        "schedule": {"list_stage_descriptions": [stage]},
        "elasticity": {"width": {"overwrite_groups": groups, "overwrite_groups_widths": widths,
                                 **width}},
    }  # fmt: skip
    nas = {"training": training} | ({"search": search} if search else {})
    return {"input_info": [], "bootstrapNAS": nas}


def llama(layers: int = 32) -> dict:
    """The unified-math configuration of LLaMA-7B, in its own spelling."""
    attention = [[f"{LLAMA.format(i)}LlamaAttention[self_attn]/Linear[{name}]/{FACTOR_A}"
                  for name in ("q_proj", "k_proj", "v_proj")] for i in range(layers)]  # fmt: skip
    mlp = [f"{LLAMA.format(i)}LlamaMLP[mlp]/Linear[{{}}]/" for i in range(layers)]
    both = ("gate_proj", "up_proj")
    width = [[m.format(n) + part for n in both for part in (WHOLE, FACTOR_B)] for m in mlp]
    rank = [[m.format(n) + FACTOR_A for n in both] for m in mlp]
    sizes = [[32, 28]] * layers + [[11008, 9632, 8256, 6880, 5504]] * layers + [[32, 28]] * layers
    search = {"algorithm": "NSGA2", "num_evals": 200, "population": 8, "ref_acc": 0.45,
              "acc_delta": 0.01}  # fmt: skip
    return configuration(attention + width + rank, sizes, search=search)


def bert() -> dict:
    """Of two layers, whose widths differ; the readers of attention are listed."""
    groups, sizes, readers = [], [], []
    for layer, (heads, width) in enumerate([([768, 384], [3072, 2634, 216]),
                                            ([768, 704, 192], [3072, 150])]):  # fmt: skip
        inside = f"{BERT.format(layer)}BertAttention[attention]/BertSelfAttention[self]/"
        names = [f"Linear[query]/{WHOLE}", f"Linear[query]/{FACTOR_B}", "NNCFLinear[key]/linear_0",
                 f"Linear[value]/{WHOLE}", f"Linear[value]/{FACTOR_B}"]  # fmt: skip
        groups.append([inside + name for name in names])
        groups.append([f"{inside}Linear[{name}]/{FACTOR_A}" for name in ("query", "value")])
        groups.append([f"{BERT.format(layer)}BertIntermediate[intermediate]/NNCFLinear[dense]/"
                       "linear_0"])  # fmt: skip
        sizes += [heads, [8, 4, 2], width]
        readers.append(f"{BERT.format(layer)}BertAttention[attention]/BertSelfOutput[output]/"
                       "NNCFLinear[dense]/linear_0")  # fmt: skip
    return configuration(groups, sizes, {"epochs": 80, "width_indicator": 4},
                         add_dynamic_inputs=readers)  # fmt: skip


def written(folder, value, commas: bool = False):
    text = json.dumps(value, indent=2)
    if commas:  # as the BLOOMz file has them, and NNCF's comments
        text = text.replace('"\n', '",\n').replace("{\n", "{\n// a comment\n", 1)
    file = folder / "nncf.json"
    file.write_text(text)
    return file


@pytest.mark.parametrize("commas", [False, True])
def test_llama_7b_as_published(tmp_path, commas):
    found = read(written(tmp_path, llama(), commas), adapt=["mlp.down_proj"])
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())
    bound = found.space.bind(model, 32)
    assert len(bound.groups) == 96
    assert bound.size == 2**32 * 5**32 * 2**32
    by_name = {group.name: group for group in bound}
    width = by_name["model.layers.31.mlp_width"]
    assert width.choices == (11008, 9632, 8256, 6880, 5504)
    assert {(cut.site.rpartition(".")[2], cut.axis) for cut in width.cuts} == {
        ("gate_proj", "out"), ("up_proj", "out"), ("down_proj", "in"),
    }  # fmt: skip
    assert by_name["model.layers.0.attention_rank"].choices == (32, 28)
    assert set(bound.targets) == {
        f"model.layers.{i}.{name}" for i in range(32)
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj",
                     "mlp.up_proj", "mlp.down_proj")
    }  # fmt: skip
    assert found.space.sections[0].blocks == "model.layers.*"


def test_stages_and_search_are_settings_of_ours(tmp_path):
    found = read(written(tmp_path, llama(2)))
    train = from_dict(TrainConfig, {"space": str(space_file(tmp_path)), **found.train}, "train")
    [stage] = train.stages
    assert (stage.epochs, stage.init_lr, stage.width_indicator) == (7, 3e-4, 5)
    assert set(stage.train_dims) == {"rank", "width"}
    assert train.adapter.rank == 32 and train.sampling == "lonas"
    search = from_dict(SearchConfig, found.search, "search")
    assert (search.sampler, search.trials, search.population) == ("nsga2", 200, 8)
    assert search.costs == ["macs"]
    assert search.budget.min_accuracy == pytest.approx(0.44)


def test_bert_has_heads_and_layers_of_its_own(tmp_path):
    found = read(written(tmp_path, bert()))
    assert [section.blocks for section in found.space.sections] == [
        "bert.encoder.layer.0", "bert.encoder.layer.1",
    ]  # fmt: skip
    with torch.device("meta"):
        model = BertForSequenceClassification(BertConfig(num_hidden_layers=2))
    groups = {group.name: group for group in found.space.bind(model, 8)}
    assert groups["bert.encoder.layer.0.heads"].choices == (12, 6)
    assert groups["bert.encoder.layer.1.heads"].choices == (12, 11, 3)
    assert groups["bert.encoder.layer.0.mlp_width"].choices == (3072, 2634, 216)
    assert groups["bert.encoder.layer.1.attention_rank"].choices == (8, 4, 2)
    [out] = [cut for cut in groups["bert.encoder.layer.0.heads"].cuts if cut.axis == "in"]
    assert (out.site, out.unit) == ("bert.encoder.layer.0.attention.output.dense", 64)
    assert set(found.space.sections[0].adapt) == {"attention.self.query", "attention.self.value"}


def test_shears_names_every_layer_at_once_and_leaves_stages_open(tmp_path):
    inside = "{re}" + LLAMA.format("{*}")
    names = [f"LlamaAttention[self_attn]/Linear[{n}]" for n in ("q_proj", "k_proj", "v_proj")]
    groups = [[f"{inside}{name}/{FACTOR_A}" for name in names],
              [f"{inside}LlamaMLP[mlp]/Linear[up_proj]/{FACTOR_A}"],
              [f"{inside}LlamaMLP[mlp]/Linear[down_proj]/{FACTOR_A}"]]  # fmt: skip
    open_ = {"epochs": -1, "init_lr": -1, "epochs_lr": -1}
    found = read(written(tmp_path, configuration(groups, [[32, 24, 16]] * 3, open_)))
    [section] = found.space.sections
    assert section.blocks == "model.layers.*"
    assert [spec.of for spec in section.groups] == [
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("mlp.up_proj",), ("mlp.down_proj",),
    ]  # fmt: skip
    assert {spec.choices for spec in section.groups} == {(32, 24, 16)}
    assert found.train["stages"] == [{"train_dims": ["rank"], "width_indicator": 5,
                                      "sample_rate": 1}]  # fmt: skip
    assert not found.search
    assert sum("epochs" in note or "init_lr" in note for note in found.notes) == 3


def test_the_command_writes_files_that_bind(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = written(tmp_path, llama(2))
    command = ["space", "import", str(file), "--save", "mine.yaml", "--adapt", "mlp.down_proj"]
    assert __main__.main(command) == 0
    said = capsys.readouterr().out
    assert "model.layers.*: 6 adapted layers" in said and "mine-search.yaml" in said
    assert len(SearchSpace.load("mine.yaml").sections) == 1
    assert "&" not in (tmp_path / "mine-train.yaml").read_text()  # no alias: a stranger reads it
    assert __main__.main(command) == 1
    assert "mine.yaml is there already" in capsys.readouterr().err


def test_show_prints_a_space_and_its_size(tiny_folder, tmp_path, capsys):
    file = str(space_file(tmp_path))
    command = ["space", "show", file, "--model.path", str(tiny_folder), "--rank", "8"]
    assert __main__.main(command) == 0
    said = capsys.readouterr().out
    found = json.loads(said.splitlines()[-1])
    bound = SearchSpace.load(file).bind(loading.skeleton(ModelConfig(path=str(tiny_folder))), 8)
    assert found["sub_adapters"] == str(bound.size)
    assert "attention_rank" in said and "8, 4, 1" in said
    assert found["costs"]["minimal"]["params"] < found["costs"]["maximal"]["params"]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: v["bootstrapNAS"].pop("training"), "'training' is missing"),
        (lambda v: v.pop("bootstrapNAS"), "no BootstrapNAS configuration"),
        (lambda v: _width(v)["overwrite_groups_widths"].pop(), "6 groups, but widths of 5"),
        (lambda v: _stage(v).update(depth_indicator=2), "stage 0 drops layers"),
        (lambda v: v["bootstrapNAS"]["search"].update(algorithm="RS"), "search algorithm RS"),
        (lambda v: v["bootstrapNAS"]["search"].pop("num_evals"), "search: .num_evals. is missing"),
        (lambda v: v["bootstrapNAS"]["search"].update(num_evals="abc"),
         r"\.search\.num_evals: expected a number, got 'abc'"),
        (lambda v: v["bootstrapNAS"]["search"].update(population=0),
         r"\.search: population is 0; at least 2"),
        (lambda v: v["bootstrapNAS"]["search"].update(ref_acc=45),
         r"\.search: budget\.min_accuracy is 44\.99; a fraction"),
        (lambda v: _stage(v).update(epochs=1.5),
         r"descriptions\[0\]\.epochs: expected a whole number, got 1\.5"),
        (lambda v: _stage(v).update(epochs=0), r"descriptions\[0\]: a stage lasts at least"),
        (lambda v: _width(v)["overwrite_groups"].__setitem__(1, []),
         r"overwrite_groups\[1\]: expected a list that is not empty, got \[\]"),
        (lambda v: _width(v)["overwrite_groups"][2].append(_width(v)["overwrite_groups"][3][0]),
         "spans blocks"),
        (lambda v: _width(v)["overwrite_groups"].__setitem__(2, ["Model/Linear[head]/linear_0"]),
         "is in no block"),
        (lambda v: _width(v)["overwrite_groups"].__setitem__(
            2, [f"{LLAMA.format(0)}Strange[strange]/Linear[thing]/{WHOLE}"]), "is not known"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_named(tmp_path, change, message):
    value = llama(2)
    change(value)
    with pytest.raises(ConfigError, match=message):
        read(written(tmp_path, value))


def places(value, path=()):
    """Where every value inside this one stands."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    for key in keys:
        yield (*path, key)
        if isinstance(value[key], dict | list):
            yield from places(value[key], (*path, key))


@pytest.mark.parametrize("odd", [None, True, -1, 0, 1.5, 3, "x", [], [1], {}, {"x": 1}], ids=repr)
def test_whatever_stands_anywhere_is_read_or_named(tmp_path, odd):
    def whole() -> dict:
        value = bert()
        value["bootstrapNAS"]["search"] = llama(1)["bootstrapNAS"]["search"]
        return value

    for *path, last in places(whole()):
        value = whole()
        functools.reduce(operator.getitem, path, value)[last] = odd
        file = written(tmp_path, value)
        try:
            read(file)
        except ConfigError as error:
            assert file.name in str(error)


def test_what_the_file_leaves_open_is_noted_and_not_written(tmp_path):
    value = llama(2)
    value["bootstrapNAS"]["search"] |= {"num_evals": -1, "population": -1}
    found = read(written(tmp_path, value))
    assert not {"trials", "population"} & set(found.search)
    assert [note for note in found.notes if "num_evals" in note or "population" in note] == [
        "the search leaves num_evals open; set trials in the search settings",
        "the search leaves population open; set population in the search settings",
    ]


def _width(value) -> dict:
    return value["bootstrapNAS"]["training"]["elasticity"]["width"]


def _stage(value) -> dict:
    return value["bootstrapNAS"]["training"]["schedule"]["list_stage_descriptions"][0]


def test_layers_that_carry_factors_can_be_named_on_the_command_line(tmp_path):
    layer = "LlamaForCausalLM/LlamaModel[model]/ModuleList[layers]/LlamaDecoderLayer[0]"
    inside = f"{layer}/LlamaMLP[mlp]/"
    file = written(tmp_path, configuration([[f"{inside}Linear[up_proj]/linear_0"]], [[64, 32]]))
    with pytest.raises(ConfigError, match=r"no layer carries factors; name .* with --adapt"):
        read(file)
    found = read(file, ["mlp.down_proj"])
    assert found.space.sections[0].adapt == ("mlp.down_proj",)
    [note] = [note for note in found.notes if "alike" in note]
    assert note.startswith("1 of the blocks in model.layers is named; the space has all that")


def test_a_file_that_is_no_json_is_named(tmp_path):
    file = tmp_path / "broken.json"
    file.write_text('{"bootstrapNAS": [')
    with pytest.raises(ConfigError, match=r"broken\.json:2: broken JSON"):
        read(file)
    with pytest.raises(ConfigError, match="no such file"):
        read(tmp_path / "absent.json")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"broken\.json: not UTF-8 text"):
        read(file)
    for text in ("", "hello", "[1, 2]", '{"input_info": []}'):
        file.write_text(text)
        with pytest.raises(
            ConfigError, match=r"broken\.json: no BootstrapNAS .*'bootstrapNAS', got"
        ):
            read(file)
