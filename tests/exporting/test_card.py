"""The model card says what the report says, and the hub can read it."""

import random
import re
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from elastic.config import BudgetConfig, ExportConfig, TaskConfig, TimingConfig, TrainConfig
from elastic.config.parsing import from_dict
from elastic.exporting import card
from elastic.exporting.probes import Agreement
from elastic.exporting.proof import Accuracy, Proof, Trade, Unproved, Weighed
from elastic.exporting.report import Model, Report
from elastic.formats import hf
from elastic.latency.measure import Latency
from elastic.spaces.bound import SubAdapter
from elastic.spaces.uniform import nearest_uniform
from elastic.supernet.compact import compact
from elastic.supernet.cost import Cost
from elastic.supernet.held_out import Compensated
from tests.helpers import tiny
from tests.helpers.tiny_runs import measurement

WIDTHS = {0: 192, 1: 128, 2: 128, 3: 128, 4: 0}
SUB = SubAdapter((
    ("model.layers.*.depth", 4),
    *((f"model.layers.{n}.{kind}", size and size // part)
      for n, size in WIDTHS.items() for kind, part in (("mlp_width", 1), ("rank", 16))),
))  # fmt: skip
SAME = Agreement(0.0, 1.0, 1, 1, False)
TIMES = {"full": Latency(25.0, 5.0, 0.0), "compact": Latency(12.5, 4.0, 0.0)}
PROOF = Proof(
    about={}, bytes=1, exact=SAME, deployed=SAME, precision="float32",
    timing=measurement(TIMES, TimingConfig(rounds=3, max_rounds=3)),
    weighed=Weighed(), texts=[], trade=Trade(),
    as_torch=True,
)  # fmt: skip
MODEL = Model("uniform-0.5", SUB, Accuracy(0.525, 400, [0.476, 0.573]),
              Cost(90_000_000, 50_000_000, 90_000_000),
              Cost(135_000_000, 100_000_000, 135_000_000),
              Compensated())  # fmt: skip
ORIGIN = {
    "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct", "method": "lora", "space": "llama.yaml",
    "task": "gsm8k", "budget": {"prefill_ms": 20.0, "min_accuracy": 0.5},
}  # fmt: skip
TRAINED = TrainConfig(
    run="/home/me/runs/x",
    task=TaskConfig(name="jsonl", train="/home/me/a.jsonl", test="/home/me/b.jsonl"),
)  # fmt: skip
REPORT = Report(
    directory=Path("there"), model=MODEL, formats={"hf": PROOF}, origin=ORIGIN,
    config=ExportConfig(run="/home/me/runs/x", seed=3), trained=TRAINED, license="apache-2.0",
    base_digest="sha256:0",
    provenance={"device": "cpu (Intel(R) Xeon(R) [8], 2 threads)",
                "versions": {"python": "3.11.7", "torch": "2.13.0+cpu"}},
)  # fmt: skip


def made(**origin) -> Report:
    return replace(REPORT, origin=ORIGIN | origin)


def section(text: str, title: str) -> str:
    return text.partition(f"## {title}\n\n")[2].partition("\n\n## ")[0]


def test_the_metadata_is_what_the_hub_reads():
    data = ModelCard(card.text(REPORT, code=True)).data.to_dict()
    assert data == {
        "library_name": "transformers", "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "base_model_relation": "finetune", "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["elastic-adapters", "lora", "pruned", "custom_code"],
        "model-index": [{"name": "uniform-0.5", "results": [{
            "task": {"type": "text-generation"},
            # As no repository is called: it would link to a stranger's data.
            "dataset": {"name": "b.jsonl", "type": "elastic-adapters-jsonl", "split": "test"},
            "metrics": [{"type": "accuracy", "value": 0.525}],
        }]}],
    }  # fmt: skip


def test_what_is_beside_transformers_folder_is_said():
    places = {"peft": "peft/", "onnx-int8": "onnx-int8/", "gguf": ""}
    config = replace(REPORT.config, push_to_hub="me/small", push_private=True)
    report = replace(REPORT, formats=dict.fromkeys(["hf", "onnx-int8"], PROOF), config=config)
    text = card.text(report, places={"hf": "", **places})
    data = ModelCard(text).data
    assert data.tags == ["elastic-adapters", "lora", "pruned", "onnx", "gguf"]
    loading = section(text, "How to load it")
    assert 'folder = "me/small"' in loading and "hf download me/small" in loading
    assert loading.splitlines()[-3:] == [
        '- `folder/peft`: `PeftModel.from_pretrained(base_model, "folder/peft")`',
        "- `folder/onnx-int8`: ONNX Runtime, weights in int8", "- `folder`: llama.cpp",
    ]  # fmt: skip
    assert "| + int8 |" in section(text, "In other programs")
    assert section(text, "Latency") == section(card.text(REPORT), "Latency")
    adapter = ModelCard(card.text(report, places={"peft": ""})).data
    assert (adapter.library_name, adapter.base_model_relation) == ("peft", "adapter")
    # Who makes it again does not push it.
    assert "push_to_hub: null\npush_private: null\n" in text


@pytest.mark.parametrize("base", ["smollm2", "/home/me/model", "C:\\models\\x", "a/b/c"])
def test_a_base_that_is_no_repository_is_not_linked(base):
    text = card.text(made(base_model=base))
    assert "base_model" not in ModelCard(text).data.to_dict()
    shown = "model" if base == "/home/me/model" else base  # where it lies is nobody else's business
    assert f"`{shown}`" in text and "/home/me" not in text


def test_a_folder_named_like_a_repository_is_not_linked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "HuggingFaceTB" / "SmolLM2-135M-Instruct").mkdir(parents=True)
    assert "base_model" not in ModelCard(card.text(REPORT)).data.to_dict()


def test_a_license_that_the_hub_does_not_know_gets_a_name(tmp_path):
    data = ModelCard(card.text(replace(REPORT, license="My-Own"))).data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "my-own")
    assert card.license_of(tmp_path) is None
    (tmp_path / card.FILE).write_text("---\nlicense: mit\ntags: [x]\n---\n# Model\n")
    assert card.license_of(tmp_path) == "mit"


@pytest.mark.parametrize("head", [
    "- license", "license: [mit]", "license: {a: b}", "license: 'mit", "date: 2020-13-45",
    "license: 'a\\nb'", "a: " + 999 * "[" + 999 * "]", "a: " + 5000 * "9", "a: !!python/name:os.x",
    "[a]: mit", "license:", "&a [*a]", "\x00", "model-index: 5", "tags: 5\n5: x", "\t",
])  # fmt: skip
def test_an_odd_card_of_the_base_has_no_license(tmp_path, head):
    (tmp_path / card.FILE).write_text(f"---\n{head}\n---\n# Model\n")
    assert card.license_of(tmp_path) is None
    (tmp_path / card.FILE).write_bytes(b"---\nlicense: m\xffit\n---\n")
    assert card.license_of(tmp_path) is None
    (tmp_path / card.FILE).unlink()
    (tmp_path / card.FILE).mkdir()
    assert card.license_of(tmp_path) is None


def test_the_hub_gets_the_accuracy_on_a_data_set_it_has():
    data = ModelCard(card.text(made(task="openai/gsm8k"))).data
    [result] = data.eval_results
    assert (data.model_name, result.dataset_type, result.dataset_split) == (
        "uniform-0.5", "openai/gsm8k", "test",
    )  # fmt: skip
    assert (result.task_type, result.metric_type, result.metric_value) == (
        "text-generation", "accuracy", 0.525,
    )  # fmt: skip
    assert data.datasets == ["openai/gsm8k"]
    unknown = replace(made(task="openai/gsm8k"), model=replace(MODEL, accuracy=Accuracy()))
    assert ModelCard(card.text(unknown)).data.eval_results is None


def test_the_settings_on_a_card_make_the_model_again():
    """But for folders, which are nobody else's business."""
    odd = replace(TRAINED, task=replace(TRAINED.task, prompt="```\n{question}\n````"))
    text = card.text(replace(REPORT, trained=odd))
    blocks = re.findall(r"<summary>(\S+)</summary>\n\n(`+)\w+\n(.*?)\2\n\n</details>", text, re.S)
    files = {name: yaml.safe_load(content) for name, _, content in blocks}
    assert list(files) == ["train.yaml", "sub_adapter.json", "export.yaml"]
    made_again = from_dict(TrainConfig, files["train.yaml"], "card")
    assert made_again == replace(
        odd, run="x", task=replace(odd.task, train="a.jsonl", test="b.jsonl")
    )
    exported = from_dict(ExportConfig, files["export.yaml"], "card")
    assert exported == replace(REPORT.config, run="x", sub_adapter="sub_adapter.json")
    assert files["sub_adapter.json"] == SUB.as_dict()
    assert "/home/me" not in text


def test_figures_are_those_of_the_report():
    text = card.text(REPORT)
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


@pytest.mark.parametrize("limit", [field.name for field in fields(BudgetConfig)])
def test_every_limit_of_a_budget_is_in_words(limit):
    text = card.text(made(budget={limit: "80%"}))
    [line] = [line for line in text.splitlines() if line.startswith("- Budget: ")]
    assert limit not in line.replace("\\", "") and "_" not in line
    bound = "at least" if limit in ("min_accuracy", "tokens_per_second") else "at most"
    assert re.fullmatch(rf"- Budget: [A-Za-z -]+ {bound} 80%", line)


def test_the_full_model_stands_beside_it():
    full = Accuracy(0.62, 100, [0.5, 0.7])
    trade = Trade(Accuracy(0.5, 100, [0.4, 0.6]), full, -0.12, [-0.204, -0.031])
    text = card.text(replace(REPORT, formats={"hf": replace(PROOF, trade=trade)}))
    assert section(text, "Quality").splitlines()[2:] == [
        "On 100 of them the full model reaches 62.0% and this one 50.0%, a difference of -12.0 "
        "points (95 % interval -20.4 to -3.1)."
    ]


def test_runs_of_equal_layers_share_a_row():
    assert section(card.text(REPORT), "Sizes by layer").splitlines() == [
        "| layers | mlp\\_width | rank |",
        "| --- | ---: | ---: |",
        "| `model.layers.0` | 192 | 12 |",
        "| `model.layers.1` to 3 | 128 | 8 |",
        "| `model.layers.4` | left out | left out |",
        "",
        "`model.layers.*.depth`: 4",
    ]


def test_what_the_report_does_not_know_is_left_out():
    model = replace(MODEL, accuracy=Accuracy(), sub=SubAdapter(()))
    unproved = {"hf": Unproved(1, "not run")}
    few = replace(made(budget=None), model=model, formats=unproved, license=None)
    text = card.text(few)
    assert "None" not in text and "nan" not in text
    assert "## Quality" not in text and "## Latency" not in text
    assert section(text, "Sizes by layer") == "Nothing was cut."


def test_a_busy_machine_is_said():
    times = {"full": Latency(25.0, 0.0, 0.0), "compact": Latency(12.5, 0.0, 0.0)}
    busy = replace(PROOF, timing=replace(PROOF.timing, latencies=times, control=0.5))
    text = section(card.text(replace(REPORT, formats={"hf": busy})), "Latency")
    assert "too busy" in text and "one more token" not in text


@pytest.mark.parametrize("name", ["a_b*c*", "<b>x</b>", "[x](y)", "a|b", "x\n# y", "`code`"])
def test_names_are_shown_as_they_are(name):
    """Through a reader of markdown, where one is installed: rich's."""
    markdown = pytest.importorskip("markdown_it").MarkdownIt("commonmark").enable("table")
    about = REPORT.provenance | {"device": name}
    report = replace(made(method=name), model=replace(MODEL, name=name), provenance=about)
    body = card.text(report).partition("\n---\n\n")[2]
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
    file = card.write(replace(REPORT, model=replace(MODEL, sub=sub)), tmp_path)
    text = file.read_text()
    assert ("trust_remote_code" in section(text, "How to load it")) is not uniform
    commands = text.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(commands, names)
    ids = tiny.tokens()
    assert torch.equal(tiny.logits(names["model"].eval(), ids), tiny.logits(model, ids))
    assert names["tokenizer"]("Tom")["input_ids"] == tiny.tokenizer()("Tom")["input_ids"]
