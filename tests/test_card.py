"""The model card says what the report says, and the hub can read it."""

import random

import pytest
import torch
from huggingface_hub import ModelCard

from elastic.exporting import card
from elastic.formats import hf
from elastic.spaces.uniform import nearest_uniform
from elastic.supernet.compact import compact
from tests import tiny

WIDTHS = {0: 192, 1: 128, 2: 128, 3: 128, 4: 0}
CONTENTS = {
    "name": "uniform-0.5",
    "sub_adapter": {
        "model.layers.*.depth": 4,
        **{f"model.layers.{n}.{kind}": size and size // part
           for n, size in WIDTHS.items() for kind, part in (("mlp_width", 1), ("rank", 16))},
    },
    "accuracy": 0.525, "accuracy_n": 400, "accuracy_interval": [0.476, 0.573],
    "params": 90e6, "full_params": 135e6, "macs": 50e6, "full_macs": 100e6,
    "formats": {"hf": {"prefill_ms": 12.5, "full_prefill_ms": 25.0, "decode_ms": 4.0,
                       "full_decode_ms": 5.0, "trusted": True}},
    "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "license": "apache-2.0",
    "method": "lora", "space": "llama.yaml", "budget": {"prefill_ms": 20.0, "min_accuracy": 0.5},
    "seed": 3, "device": "cpu (Intel(R) Xeon(R) [8], 2 threads)",
    "versions": {"python": "3.11.7", "torch": "2.13.0+cpu"},
}  # fmt: skip


def section(text: str, title: str) -> str:
    return text.partition(f"## {title}\n\n")[2].partition("\n\n## ")[0]


def test_the_metadata_is_what_the_hub_reads():
    data = ModelCard(card.text(CONTENTS, code=True)).data.to_dict()
    assert data == {
        "library_name": "transformers", "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "finetune", "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["elastic-adapters", "lora", "pruned", "custom_code"],
    }  # fmt: skip


@pytest.mark.parametrize("base", ["smollm2", "/home/me/model", "C:\\models\\x", "a/b/c"])
def test_a_base_that_is_no_repository_is_not_linked(base):
    text = card.text(CONTENTS | {"base_model": base})
    assert "base_model" not in ModelCard(text).data.to_dict()
    assert f"`{base}`" in text


def test_a_folder_named_like_a_repository_is_not_linked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct").mkdir(parents=True)
    assert "base_model" not in ModelCard(card.text(CONTENTS)).data.to_dict()


def test_a_license_that_the_hub_does_not_know_gets_a_name(tmp_path):
    data = ModelCard(card.text(CONTENTS | {"license": "My-Own"})).data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "my-own")
    assert card.license_of(tmp_path) is None
    (tmp_path / card.FILE).write_text("---\nlicense: mit\ntags: [x]\n---\n# Model\n")
    assert card.license_of(tmp_path) == "mit"


def test_figures_are_those_of_the_report():
    text = card.text(CONTENTS)
    assert text.splitlines()[text.splitlines().index("---", 1) + 2] == "# uniform-0.5"
    assert "90.0 M of 135.0 M parameters and 50% of the operations" in text
    assert section(text, "Quality") == (
        "Accuracy 52.5% (95 % interval 47.6% to 57.3%) on 400 test examples that the search never "
        "saw."
    )
    assert section(text, "Latency").splitlines()[2:] == [
        "| prefill, ms | 12.50 | 25.00 | 50% |",
        "| one more token, ms | 4.00 | 5.00 | 80% |",
    ]
    made = section(text, "How it was made")
    for line in ("Adapter method: `lora`", "Search space: `llama.yaml`", "Seed: `3`",
                 "License of the base model: apache-2.0", "Budget: prefill ms at most 20",
                 "Budget: accuracy at least 0.5", "torch 2.13.0+cpu"):  # fmt: skip
        assert line in made, line


def test_the_full_model_stands_beside_it():
    found = {"accuracy": 0.5, "full_accuracy": 0.62, "full_accuracy_n": 100,
             "difference": -0.12, "difference_interval": [-0.204, -0.031]}  # fmt: skip
    text = card.text(CONTENTS | {"formats": {"hf": CONTENTS["formats"]["hf"] | found}})
    assert section(text, "Quality").splitlines()[2:] == [
        "On 100 of them the full model reaches 62.0% and this one 50.0%, a difference of -12.0 "
        "points (95 % interval -20.4 to -3.1)."
    ]


def test_runs_of_equal_layers_share_a_row():
    assert section(card.text(CONTENTS), "Sizes by layer").splitlines() == [
        "| layers | mlp\\_width | rank |",
        "| --- | ---: | ---: |",
        "| `model.layers.0` | 192 | 12 |",
        "| `model.layers.1` to 3 | 128 | 8 |",
        "| `model.layers.4` | left out | left out |",
        "",
        "`model.layers.*.depth`: 4",
    ]


def test_what_the_report_does_not_know_is_left_out():
    known = ("name", "sub_adapter", "params", "full_params", "macs", "full_macs", "base_model")
    few = {key: CONTENTS[key] for key in known}
    text = card.text(few | {"formats": {}, "accuracy": None, "sub_adapter": {}})
    assert "None" not in text and "nan" not in text
    assert "## Quality" not in text and "## Latency" not in text
    assert section(text, "Sizes by layer") == "Nothing was cut."


def test_a_busy_machine_is_said():
    found = CONTENTS["formats"]["hf"] | {"trusted": False, "decode_ms": 0.0}
    text = section(card.text(CONTENTS | {"formats": {"hf": found}}), "Latency")
    assert "too busy" in text and "one more token" not in text


@pytest.mark.parametrize("name", ["a_b*c*", "<b>x</b>", "[x](y)", "a|b", "x\n# y", "`code`"])
def test_names_are_shown_as_they_are(name):
    """Through a reader of markdown, where one is installed: rich's."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    contents = CONTENTS | {"name": name, "device": name, "method": name}
    body = card.text(contents).partition("\n---\n\n")[2]
    tokens = markdown.parse(body)
    title = tokens[1]
    shown = "".join(child.content for child in title.children)
    assert shown == " ".join(name.split())
    assert {child.type for child in title.children} <= {"text", "text_special"}
    spans = [c for t in tokens for c in t.children or () if c.type == "code_inline"]
    assert " ".join(name.split()) in [span.content for span in spans]
    assert sum(token.type == "heading_open" and token.tag == "h1" for token in tokens) == 1
    assert sum(token.type == "table_open" for token in tokens) == 2


@pytest.mark.parametrize("uniform", [True, False])
def test_the_commands_of_a_card_load_its_folder(uniform, tmp_path, monkeypatch):
    net = tiny.supernet(dtype=torch.float32)
    drawn = (net.space.random(random.Random(seed)) for seed in range(20))
    mixed = next(sub for sub in drawn if not tiny.is_uniform(net.space, sub))
    sub = nearest_uniform(net.space, mixed) if uniform else mixed
    model = compact(net, sub)
    hf.write(model, tiny.tokenizer(), tmp_path)
    file = card.write(CONTENTS | {"sub_adapter": sub.as_dict()}, tmp_path)
    text = file.read_text()
    assert ("trust_remote_code" in text) is not uniform
    commands = text.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(commands, names)
    ids = tiny.tokens()
    assert torch.equal(tiny.logits(names["model"].eval(), ids), tiny.logits(model, ids))
    assert names["tokenizer"]("Tom")["input_ids"] == tiny.tokenizer()("Tom")["input_ids"]
