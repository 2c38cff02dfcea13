"""Search spaces, stages and searches as LoNAS and Shears published them, in our YAML.

They are configurations of NNCF's BootstrapNAS: groups of nodes of the traced model, each a chain of
Class[attribute], with the widths that each group may take. A rank is the width of lora_A's output.
"""

from __future__ import annotations

import math
import re
import reprlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from elastic.config import BudgetConfig, SearchConfig, SpaceImportConfig, StageConfig
from elastic.errors import ConfigError
from elastic.files import write_text
from elastic.plain import parse_yaml, read_text
from elastic.spaces.declared import SearchSpace, describe

READERS = {
    "gate_proj": "down_proj",
    "up_proj": "down_proj",
    "dense_h_to_4h": "dense_4h_to_h",
    "fc1": "fc2",
    "c_fc": "c_proj",
    "wi": "wo",
    "wi_0": "wo",
    "wi_1": "wo",
}
"""What reads the channels that a layer makes; both stand in the same module."""
FAR_READERS = {
    "intermediate.dense": "output.dense",
    "attention.self.query": "attention.output.dense",
    "attention.self.key": "attention.output.dense",
    "attention.self.value": "attention.output.dense",
    "self_attn.q_proj": "self_attn.o_proj",
    "self_attn.k_proj": "self_attn.o_proj",
    "self_attn.v_proj": "self_attn.o_proj",
}
"""The same for layers that stand elsewhere, by their names in the block."""
ATTENTION = re.compile(r"(^|\.)(self_attn|attention|self_attention|attn)\.")
SEARCHES = {"NSGA2": "nsga2"}
UNSET = -1
"""Where a published file leaves a value to the command line."""


@dataclass(frozen=True)
class Entry:
    """A value of the file and where it stands there; ConfigError names both when the value is not
    what is asked for."""

    value: Any
    where: str

    def get(self, key: str) -> Entry | None:
        """What a mapping has under this name; None if that is nothing."""
        self._expect("a mapping", isinstance(self.value, dict))
        return Entry(self.value[key], f"{self.where}.{key}") if key in self.value else None

    def __getitem__(self, key: str) -> Entry:
        """The same, of what must be there."""
        if (found := self.get(key)) is None:
            raise ConfigError(f"{self.where}: {key!r} is missing")
        return found

    def items(self) -> list[Entry]:
        self._expect("a list", isinstance(self.value, list))
        return [Entry(item, f"{self.where}[{n}]") for n, item in enumerate(self.value)]

    def some(self) -> list[Entry]:
        """The items, of which there is one at least."""
        self._expect("a list that is not empty", self.value != [])
        return self.items()

    def text(self) -> str:
        self._expect("a text", isinstance(self.value, str))
        return str(self.value)

    def number(self) -> float:
        """YAML takes 3e-4, without a dot, for a text."""
        try:
            found = float(self.value)
        except (TypeError, ValueError, OverflowError):
            found = math.nan
        self._expect("a number", math.isfinite(found) and not isinstance(self.value, bool))
        return found

    def whole(self) -> int:
        self._expect("a whole number", self.number().is_integer())
        return int(self.number())

    def count(self) -> int:
        self._expect("a whole number from 1 up", self.whole() >= 1)
        return self.whole()

    def is_on(self) -> bool:
        self._expect("true or false", isinstance(self.value, bool))
        return bool(self.value)

    def _expect(self, what: str, so: bool) -> None:
        if not so:
            raise ConfigError(f"{self.where}: expected {what}, got {reprlib.repr(self.value)}")


STAGE = {"epochs": Entry.whole, "width_indicator": Entry.whole, "init_lr": Entry.number,
         "epochs_lr": Entry.whole, "sample_rate": Entry.whole}  # fmt: skip
"""What a stage says that is a setting of ours, too."""


@dataclass(frozen=True)
class Node:
    """One layer that a group names."""

    block: str
    name: str
    """In the block."""
    rank: bool
    adapted: bool


@dataclass(frozen=True)
class Imported:
    """What a published file says, as our settings."""

    space: SearchSpace
    train: Mapping[str, Any]
    search: Mapping[str, Any]
    files: Sequence[Path] = ()
    notes: Sequence[str] = field(default_factory=list)

    def show(self) -> None:
        notes = (f"Note: {note}" for note in self.notes)
        print(*describe(self.space), *notes, *self.files, sep="\n")


def import_space(config: SpaceImportConfig) -> Imported:
    """Read the file and write NAME.yaml, NAME-train.yaml and NAME-search.yaml.

    ConfigError when the file is no such configuration, or names what no space here can say.
    """
    source = Path(config.file)
    target = Path(config.save or source.with_suffix(".yaml").name)
    found = read(source, config.adapt)
    files: dict[Path, Any] = {target: found.space.as_dict()}
    train = {"space": str(target), **found.train}
    files[target.with_name(f"{target.stem}-train.yaml")] = train
    if found.search:
        files[target.with_name(f"{target.stem}-search.yaml")] = found.search
    if existing := [str(file) for file in files if file.exists()]:
        raise ConfigError(f"{existing[0]} is there already; give another --save")
    for file, value in files.items():
        text = yaml.safe_dump(value, sort_keys=False, default_flow_style=None, width=100)
        write_text(file, f"# From {source.name}, as published for NNCF.\n{text}")
    return Imported(found.space, train, found.search, list(files), found.notes)


def read(source: Path, adapt: Sequence[str] = ()) -> Imported:
    """The same without writing. `adapt` names further layers of a block that carry factors;
    ConfigError names what in the file is no search space."""
    nas = _parsed(source)
    training = nas["training"]
    width = training["elasticity"]["width"]
    groups, sizes = width["overwrite_groups"].items(), width["overwrite_groups_widths"].items()
    stages = training["schedule"]["list_stage_descriptions"].items()
    if len(groups) != len(sizes):
        raise ConfigError(f"{source}: {len(groups)} groups, but widths of {len(sizes)}")
    listed = width.get("add_dynamic_inputs")
    nodes = [_node(name) for name in listed.items()] if listed else []
    readers = {(node.block, node.name) for node in nodes}
    blocks: dict[str, dict[str, Any]] = defaultdict(lambda: {"adapt": {}, "groups": {}})
    for group, widths in zip(groups, sizes, strict=True):
        _add(blocks, group, [size.count() for size in widths.some()], readers)
    for block in blocks.values():
        block["adapt"] |= dict.fromkeys(adapt)
    if not any(block["adapt"] for block in blocks.values()):
        raise ConfigError(
            f"{source}: no layer carries factors; name layers of a block that do with --adapt"
        )
    declared = list(_sections(blocks))
    space = SearchSpace.from_dict(declared, source.name)
    notes = [
        "layers that carry factors of full rank are not named in such a file; say which with "
        "--adapt"
    ] * (not adapt)
    for pattern in (one["blocks"] for one in declared):
        parent = pattern.removesuffix(".*")
        named = [block for block in blocks if block.rpartition(".")[0] == parent]
        if pattern.endswith("*") and pattern not in blocks:
            notes.append(
                f"{len(named)} of the blocks in {parent} "
                f"{'is' if len(named) == 1 else 'are'} named; the space has all that a model has "
                "there, which may be more, and all alike"
            )
    train = _train(space, stages, training.get("sandwich_rule"), notes)
    section = nas.get("search")
    search = _search(section, notes) if section and section.value != {} else {}
    return Imported(space, train, search, (), notes)


def _parsed(source: Path) -> Entry:
    """JSON with trailing commas and comments, as NNCF takes it: YAML but for the comments."""
    text = re.sub(r"^\s*//.*$", "", read_text(source, ConfigError), flags=re.MULTILINE)
    value = parse_yaml(text.replace("\t", " "), source)
    if not isinstance(value, dict) or "bootstrapNAS" not in value:
        raise ConfigError(
            f"{source}: no BootstrapNAS configuration; expected a mapping with 'bootstrapNAS', got "
            f"{reprlib.repr(value)}"
        )
    return Entry(value["bootstrapNAS"], f"{source}: bootstrapNAS")


def _node(entry: Entry) -> Node:
    """From PeftModel/LoraModel[base_model]/Model[model]/ModuleList[layers]/Layer[0]/.../linear_0;
    {*} in brackets is every block."""
    name = entry.text()
    attributes = re.findall(r"\w+\[([^\]]+)\]", name)
    if name.removeprefix("{re}").startswith("Peft"):
        attributes = attributes[2:]  # base_model, model
    inside = [part for part in ("lora_A", "lora_B", "self_linear") if part in attributes]
    if inside:
        attributes = attributes[: attributes.index(inside[0])]
    attributes = ["*" if part == "{*}" else part for part in attributes]
    numbered = [i for i, part in enumerate(attributes) if part == "*" or part.isdigit()]
    if not numbered:
        raise ConfigError(f"{entry.where}: node {name!r} is in no block")
    end = numbered[0] + 1
    block, rest = ".".join(attributes[:end]), ".".join(attributes[end:])
    return Node(block, rest, "lora_A" in inside, bool(inside))


def _add(
    blocks: dict[str, dict[str, Any]],
    group: Entry,
    widths: list[int],
    readers: set[tuple[str, str]],
) -> None:
    """One group, to the block that it belongs to."""
    nodes = [_node(name) for name in group.some()]
    if len({(node.block, node.rank) for node in nodes}) != 1:
        raise ConfigError(
            f"{group.where}: a group of {nodes[0].name} spans blocks, or ranks and widths"
        )
    block = blocks[nodes[0].block]
    layers = list(dict.fromkeys(node.name for node in nodes))
    block["adapt"] |= dict.fromkeys(node.name for node in nodes if node.adapted)
    attention = all(ATTENTION.search(name) for name in layers)
    if nodes[0].rank:
        spec = {"dim": "rank", "of": layers, "choices": widths}
        kind = "attention_rank" if attention else "mlp_rank"
    else:
        found = {_reader(nodes[0].block, name, readers, group.where) for name in layers}
        spec = {"dim": "width", "outputs": layers, "inputs": sorted(found), "choices": widths}
        kind = "mlp_width"
        if attention:  # whole heads, whatever their size
            choices = [width / max(widths) for width in widths]
            spec, kind = {**spec, "dim": "heads", "choices": choices}, "heads"
    while kind in block["groups"]:
        kind = f"{kind}_{layers[0].rpartition('.')[2]}"
    block["groups"][kind] = spec


def _reader(block: str, name: str, readers: set[tuple[str, str]], where: str) -> str:
    parent, _, leaf = name.rpartition(".")
    near = READERS.get(leaf)
    found = FAR_READERS.get(name) or (near and ".".join(filter(None, (parent, near))))
    listed = [other for owner, other in readers if owner == block]
    if found is None and len(listed) != 1:
        raise ConfigError(
            f"{where}: which layer of {block} reads the channels of {name} is not known; write "
            "this group by hand (see search_spaces/)"
        )
    return found or listed[0]


def _sections(blocks: Mapping[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """One for all blocks that are declared alike, one for each of the others."""
    families: dict[str, list[str]] = defaultdict(list)
    for block in blocks:
        families[f"{block.rpartition('.')[0]}.*"].append(block)
    for pattern, members in families.items():
        declared = [
            {"adapt": list(blocks[block]["adapt"]), "groups": blocks[block]["groups"]}
            for block in members
        ]
        if all(other == declared[0] for other in declared):
            yield {"blocks": pattern, **declared[0]}
        else:
            for block, own in zip(members, declared, strict=True):
                yield {"blocks": block, **own}


def _train(
    space: SearchSpace,
    stages: Sequence[Entry],
    sandwich: Entry | None,
    notes: list[str],
) -> dict[str, Any]:
    specs = [spec for section in space.sections for spec in section.groups]
    ranks = [choice for spec in specs if spec.dim == "rank" for choice in spec.choices]
    order = [dim for dim in ("rank", "width", "heads") if dim in {spec.dim for spec in specs}]
    found: dict[str, Any] = {"sampling": "lonas", "progressivity": order}
    if ranks:
        found["adapter"] = {"rank": max(ranks)}
    if sandwich and sandwich.is_on():
        found["sampling"] = "sandwich"
    if any(flag.is_on() for stage in stages if (flag := stage.get("reorg_weights"))):
        found["order"] = "norm"
    found["stages"] = [
        {"train_dims": [*order], **_stage(stage, f"stage {number}", notes)}
        for number, stage in enumerate(stages)
    ]
    return found


def _stage(stage: Entry, name: str, notes: list[str]) -> dict[str, Any]:
    depth = stage.get("depth_indicator")
    if depth and depth.whole() > 1:
        raise ConfigError(
            f"{depth.where}: {name} drops layers (depth_indicator {depth.value}); import it with 1 "
            "and add a group of dim depth to the space"
        )
    own = {}
    for key, value in STAGE.items():
        entry = stage.get(key)
        what = f"{name} leaves {key} open; set it in the training settings"
        if entry and not _is_open(entry, what, notes):
            own[key] = value(entry)
    _check(StageConfig, own, stage)
    return own


def _search(section: Entry, notes: list[str]) -> dict[str, Any]:
    """Accuracy against operations; LoNAS takes the fewest operations above ref_acc - acc_delta."""
    named = section.get("algorithm")
    algorithm = named.text() if named else "NSGA2"
    if algorithm not in SEARCHES:
        where = (named or section).where
        raise ConfigError(f"{where}: search algorithm {algorithm}; known: {', '.join(SEARCHES)}")
    found: dict[str, Any] = {"sampler": SEARCHES[algorithm], "objectives": ["accuracy", "macs"]}
    for key, ours in (("num_evals", "trials"), ("population", "population")):
        what = f"the search leaves {key} open; set {ours} in the search settings"
        if not _is_open(section[key], what, notes):
            found[ours] = section[key].whole()
    _check(SearchConfig, found, section)
    accuracy, lost = section.get("ref_acc"), section.get("acc_delta")
    least = (accuracy.number() if accuracy else UNSET) - (lost.number() if lost else 0)
    if least > 0:
        found["budget"] = {"min_accuracy": round(least, 6)}
        _check(BudgetConfig, found["budget"], section)
    return found


def _is_open(entry: Entry, what: str, notes: list[str]) -> bool:
    """Whether the file leaves this number to the command line, which is noted."""
    left = entry.number() == UNSET
    notes += [what] * left
    return left


def _check(kind: type, values: Mapping[str, Any], entry: Entry) -> None:
    """What our settings refuse is refused where the file says it."""
    try:
        kind(**values)
    except ConfigError as error:
        raise ConfigError(f"{entry.where}: {error}") from None
