"""What the hub gets is what lies on disk, with a card; whoever may not write there hears of it
before anything is computed."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, constants
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from transformers import AutoModelForCausalLM

import elastic
from elastic.config import ExportConfig, MergeAdapterConfig, MergeConfig, RecoveryConfig
from elastic.config.export import SlicesConfig
from elastic.config.parsing import parse
from elastic.errors import ConfigError, ExportError, RunError
from elastic.exporting.card import RUNTIMES
from elastic.exporting.command import export
from elastic.exporting.push import places, push
from elastic.exporting.report import Report
from elastic.exporting.targets import FORMATS
from elastic.recovery.command import export as recovering
from tests.helpers import hub as stand_in
from tests.helpers import tiny
from tests.helpers.exports import config
from tests.helpers.hub import NAME, Hub
from tests.helpers.tiny_runs import snapshot


@contextmanager
def talking_to_a_hub(folder: Path) -> Iterator[Hub]:
    """The hub that huggingface_hub talks to inside, with a token that is good there: as
    HF_ENDPOINT, HF_HUB_OFFLINE and their kin say to a process of its own."""
    with stand_in.served() as served, pytest.MonkeyPatch.context() as patch:
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, served.url)
        for name, value in {
            "ENDPOINT": served.url, "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_OFFLINE": False, "HF_HUB_DISABLE_XET": True,
            "HF_TOKEN_PATH": str(folder / "token"), "HF_STORED_TOKENS_PATH": str(folder / "tokens"),
        }.items():  # fmt: skip
            patch.setattr(constants, name, value)
        patch.setenv("HF_TOKEN", stand_in.TOKEN)
        disable_progress_bars()
        yield served
        enable_progress_bars()
        assert not served.unknown
        huggingface_hub.close_session()


@pytest.fixture
def hub(tmp_path):
    with talking_to_a_hub(tmp_path) as served:
        yield served


@dataclass(frozen=True)
class Pushed:
    """An export that is on a hub as well."""

    report: Report
    hub: Hub

    def fetched(self, folder: Path) -> str:
        with talking_to_a_hub(folder) as served:
            served.name, served.files = NAME, self.hub.files
            return huggingface_hub.snapshot_download(NAME, cache_dir=folder / "cache")

    def names_a_place(self) -> list[str]:
        """Files on the hub in which a folder of this machine is named."""
        trained = self.report.trained
        folders = [
            str(self.report.directory.parents[2]),
            trained.model.path,
            str(Path(trained.space).parent),
            str(Path(trained.run).parent),
        ]
        places = [str(Path.home()), *folders, str(Path(str(trained.task.test)).parent)]
        files = self.hub.files.items()
        return [name for name, text in files if any(p.encode() in text for p in places)]


@pytest.fixture(scope="module")
def pushed(trained, tmp_path_factory):
    """By its formats, what the command leaves here and there."""
    folder = tmp_path_factory.mktemp("hub")
    found = {}
    for formats, more in (("hf,peft,elastic", []), ("elastic", ["--push_private", "true"])):
        with talking_to_a_hub(folder) as served:
            asked = parse(ExportConfig, [
                str(trained.path), "--sub_adapter", "maximal", "--push_to_hub", NAME, *more,
                "--name", formats, "--formats", formats, "--runtime_examples", "0",
                "--timing.prompt_tokens", "4", "--timing.rounds", "1", "--timing.max_rounds", "1",
            ])  # fmt: skip
            found[formats] = Pushed(export(asked), served)
    return found


def below(folder: Path, place: str = "") -> dict[str, bytes]:
    """The files of a folder, by where they lie in the repository."""
    files = snapshot(folder).items()
    return {f"{place}{path}": content for path, content in files if content is not None}


def test_what_the_hub_gets_is_what_lies_here(pushed, tmp_path, capsys):
    one = pushed["hf,peft,elastic"]
    hub, folder = one.hub, one.report.directory
    assert hub.files == {**below(folder / "hf"), **below(folder / "elastic", "elastic/")}
    assert hub.commits == 1 and hub.visibility is None
    assert (folder / "peft").is_dir()  # whose base is a folder here
    assert not one.names_a_place()

    one.report.show()
    *_, url, last = capsys.readouterr().out.splitlines()
    assert url == f"{hub.url}/{NAME}"
    assert json.loads(last) == {"report": str(folder / "report.json"), "hub": url}

    with talking_to_a_hub(tmp_path) as served:
        served.name, served.files = NAME, hub.files
        there = AutoModelForCausalLM.from_pretrained(NAME, cache_dir=tmp_path / "cache")
    here, ids = AutoModelForCausalLM.from_pretrained(folder / "hf"), tiny.tokens()
    assert torch.equal(tiny.logits(there, ids), tiny.logits(here, ids))


@pytest.mark.parametrize(
    ("formats", "library"), [("hf,peft,elastic", "transformers"), ("elastic", "elastic-adapters")]
)
def test_the_hub_reads_off_the_card_what_the_report_says(pushed, formats, library):
    one = pushed[formats]
    report = json.loads((one.report.directory / "report.json").read_text())
    card = ModelCard(one.hub.files["README.md"].decode())
    [result] = card.data.eval_results
    assert (result.metric_type, result.metric_value) == ("accuracy", report["accuracy"])
    assert 0 < result.metric_value < 1
    assert (result.dataset_name, result.dataset_split) == ("test.jsonl", "test")
    assert card.data.library_name == library
    low, high = report["accuracy_interval"]
    assert f"{low:.1%} to {high:.1%}) on {report['accuracy_n']} test examples" in card.text
    assert "elastic export --config export.yaml" in card.text


def test_a_format_that_is_alone_is_the_root_and_has_a_card(pushed, tmp_path):
    one = pushed["elastic"]
    hub, folder = one.hub, one.report.directory
    card = (folder / "README.md").read_bytes()
    assert hub.files == {**below(folder / "elastic"), "README.md": card}
    assert (folder / "elastic" / "README.md").read_text().strip() in card.decode()
    assert hub.visibility == "private" and not one.names_a_place()
    there, ids = elastic.load(one.fetched(tmp_path), slice="full"), tiny.tokens()
    whole = pushed["hf,peft,elastic"].report.directory / "hf"
    here = AutoModelForCausalLM.from_pretrained(whole)
    assert torch.equal(tiny.logits(there, ids), tiny.logits(here, ids))


def test_where_every_format_lies():
    def lies(kinds, base, referred="copy"):
        config = ExportConfig(formats=["elastic"], slices=SlicesConfig(base=referred))
        return places(config, kinds, base)

    kinds = ["hf", "peft", "onnx", "onnx-int8", "gguf"]
    onnx = {"onnx": "onnx/", "onnx-int8": "onnx-int8/"}
    assert lies(kinds, "owner/base") == {"hf": "", "peft": "peft/", **onnx, "gguf": ""}
    assert lies(kinds, "/home/me/base") == {"hf": "", **onnx, "gguf": ""}
    assert lies(["peft", "onnx"], "/home/me/base") == {"onnx": ""}
    assert lies(["peft"], "owner/base") == {"peft": ""}
    assert lies(["peft"], "smollm2") == {}
    assert lies(["elastic"], "/home/me/base") == {"elastic": ""}
    assert lies(["elastic"], "owner/base", "reference") == {"elastic": ""}
    assert lies(["elastic"], "/home/me/base", "reference") == {}
    assert {kind.partition("-")[0] for kind in FORMATS} == {"hf", *RUNTIMES}


def test_weights_of_an_earlier_model_are_not_taken_for_this_one(pushed, hub):
    one, hub.name = pushed["elastic"], NAME
    old = ["base/model-00001-of-00002.safetensors", "base/model.safetensors.index.json"]
    kept = ["base/mine.safetensors", "notes.txt", "other/model-00001-of-00002.safetensors"]
    hub.files = dict.fromkeys(["slices.json", *old, *kept], b"old")
    push(one.report)
    assert hub.files == {**one.hub.files, **dict.fromkeys(kept, b"old")}


NEVER = {
    "no token": (NAME, {"HF_TOKEN": None}, r"there is no token; run `hf auth login`, or set"),
    "refused": (NAME, {"HF_TOKEN": "hf_old"}, r"the hub refuses the token \(401\)"),
    "owner": ("stranger/new", {}, r"the token may not write there \(403\)"),
    "theirs": ("stranger/model", {}, r"the token may not write there \(403\)"),
    "offline": (NAME, {"HF_HUB_OFFLINE": True}, r"the hub client is offline; unset HF_HUB_OFFLINE"),
    "unreachable": (NAME, {"ENDPOINT": "http://127.0.0.1:9"}, r"ConnectError: "),
}


@pytest.mark.parametrize(("case", "recover"), [*((case, 0) for case in NEVER), ("no token", 3)])
def test_who_may_not_write_there_hears_it_first(
    trained, hub, case, recover, monkeypatch, forbid_weights
):
    name, settings, message = NEVER[case]
    hub.strangers = {"stranger/model"}
    for key, value in settings.items():
        if value is None:
            monkeypatch.delenv(key)
        elif key == "HF_TOKEN":
            monkeypatch.setenv(key, value)
        else:
            monkeypatch.setattr(constants, key, value)
    before = snapshot(trained.path)
    steps = RecoveryConfig(steps=recover)
    with pytest.raises(ExportError, match=f"^push_to_hub {name}: {message}"):
        recovering(config(trained, push_to_hub=name, recover=steps, sub_adapter="minimal"))
    assert snapshot(trained.path) == before and not hub.files


def test_an_adapter_alone_on_a_base_of_this_machine_is_refused(trained, hub, forbid_weights):
    with pytest.raises(ConfigError, match=r"names its base model, .* add another format"):
        export(config(trained, push_to_hub=NAME, formats=["peft"], sub_adapter="maximal"))
    assert hub.name is None


@pytest.mark.parametrize("steps", [0, 3])
def test_what_is_refused_anyway_makes_no_repository_and_is_not_trained_on(
    trained, hub, steps, forbid_weights
):
    nothing = MergeConfig(adapters=[MergeAdapterConfig(path="./nothing")])
    known = {"push_to_hub": NAME, "recover": RecoveryConfig(steps=steps), "sub_adapter": "minimal"}
    with pytest.raises(RunError, match="nothing: no such directory"):
        recovering(config(trained, **known, merge=nothing))
    with pytest.raises(RunError, match="unknown sub-adapter 'minimall'"):
        recovering(config(trained, **known | {"sub_adapter": "minimall"}))
    assert hub.name is None


@pytest.mark.parametrize(
    "name", ["small", "", "a/b/c", "somebody/.", "some body/x", "a/b--c", "/x"]
)
def test_a_name_that_no_repository_can_have_is_refused(name):
    with pytest.raises(ConfigError, match="give OWNER/NAME"):
        ExportConfig(push_to_hub=name)


def test_private_is_about_a_repository():
    with pytest.raises(ConfigError, match="push_to_hub names"):
        ExportConfig(push_private=True)


@pytest.mark.parametrize("formats", ["hf,peft,elastic", "elastic"])
def test_a_push_that_breaks_off_says_how_to_go_on(pushed, hub, formats):
    """The commands that it names do what the push would have done."""
    one, hub.name, hub.fails_at = pushed[formats], NAME, "/commit/"
    folder = one.report.directory
    before = snapshot(folder)
    with pytest.raises(ExportError) as caught:
        push(one.report)
    message = str(caught.value)
    assert "RemoteProtocolError" in message and f"is whole, in {folder}; this goes on: " in message
    assert hub.files == {} and snapshot(folder) == before
    hub.fails_at = "nothing"
    for command in message.partition("this goes on: ")[2].split(" && "):
        *begin, name, here, place = shlex.split(command)
        assert begin == ["hf", "upload"]
        if Path(here).is_dir():
            HfApi().upload_folder(repo_id=name, folder_path=here, path_in_repo=place)
        else:
            HfApi().upload_file(repo_id=name, path_or_fileobj=here, path_in_repo=place)
    assert hub.files == one.hub.files


def test_an_upload_that_is_refused_is_named(pushed, hub):
    hub.name, hub.refuses = NAME, "/large/"
    with pytest.raises(
        ExportError, match=r"uploading '.*safetensors' .*Bad request: no; .*; this goes on: hf "
    ):
        push(pushed["elastic"].report)
    assert hub.files == {}
