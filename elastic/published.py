"""Search spaces, stages and searches as LoNAS and Shears published them, in our YAML.

They are configurations of NNCF's BootstrapNAS: groups of nodes of the traced model, each a chain of
Class[attribute], with the widths that each group may take. A rank is the width of lora_A's output.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from elastic.binding import SearchSpace
from elastic.errors import ConfigError
from elastic.files import write_text
from elastic.space_config import SpaceImportConfig

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
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
UNSET = -1
"""Where a published file leaves a value to the command line."""


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
        from elastic.discovery import describe

        for line in (*describe(self.space), *(f"Note: {note}" for note in self.notes)):
            print(line)
        for file in self.files:
            print(file)


def import_space(config: SpaceImportConfig) -> Imported:
    """Read the file and write NAME.yaml, NAME-train.yaml and NAME-search.yaml.

    ConfigError when the file is no such configuration, or names what no space here can say.
    """
    source = Path(config.file)
    target = Path(config.save or source.with_suffix(".yaml").name)
    found = read(source, config.adapt)
    files = {target: found.space.as_dict()}
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
    """The same without writing. `adapt` names further layers of a block that carry factors."""
    nas = _parsed(source).get("bootstrapNAS")
    try:
        training = nas["training"]
        width = training["elasticity"]["width"]
        names, sizes = width["overwrite_groups"], width["overwrite_groups_widths"]
        stages = training["schedule"]["list_stage_descriptions"]
    except (KeyError, TypeError) as error:
        raise ConfigError(
            f"{source}: no BootstrapNAS configuration of elastic widths; {error} is missing"
        ) from None
    if len(names) != len(sizes):
        raise ConfigError(f"{source}: {len(names)} groups, but widths of {len(sizes)}")
    readers = {(node.block, node.name) for node in map(_node, width.get("add_dynamic_inputs", ()))}
    blocks: dict[str, dict[str, Any]] = defaultdict(lambda: {"adapt": {}, "groups": {}})
    for group, widths in zip(names, sizes, strict=True):
        nodes = [_node(name) for name in group]
        _add(blocks, nodes, list(widths), readers, source)
    for block in blocks.values():
        block["adapt"] |= dict.fromkeys(adapt)
    declared = list(_sections(blocks))
    space = SearchSpace.from_dict(declared, source.name)
    dims = {spec.dim for section in space.sections for spec in section.groups}
    notes = [
        "layers that carry factors of full rank are not named in such a file; say which with "
        "--adapt"
    ] * (not adapt)
    train = _train(space, dims, stages, training, notes, source)
    return Imported(space, train, _search(nas.get("search", {}), source), (), notes)


def _parsed(source: Path) -> dict[str, Any]:
    """JSON with trailing commas and comments, as NNCF takes it: YAML but for the comments."""
    try:
        text = re.sub(r"^\s*//.*$", "", source.read_text(encoding="utf-8"), flags=re.MULTILINE)
        value = yaml.load(text.replace("\t", " "), LOADER)
    except OSError as error:
        raise ConfigError(f"{source}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: broken JSON: {error}") from None
    return value if isinstance(value, dict) else {}


def _node(name: str) -> Node:
    """From PeftModel/LoraModel[base_model]/Model[model]/ModuleList[layers]/Layer[0]/.../linear_0;
    {*} in brackets is every block."""
    attributes = re.findall(r"\w+\[([^\]]+)\]", name)
    if name.removeprefix("{re}").startswith("Peft"):
        attributes = attributes[2:]  # base_model, model
    inside = [part for part in ("lora_A", "lora_B", "self_linear") if part in attributes]
    if inside:
        attributes = attributes[: attributes.index(inside[0])]
    attributes = ["*" if part == "{*}" else part for part in attributes]
    numbered = [i for i, part in enumerate(attributes) if part == "*" or part.isdigit()]
    if not numbered:
        raise ConfigError(f"node {name!r} is in no block")
    end = numbered[0] + 1
    block, rest = ".".join(attributes[:end]), ".".join(attributes[end:])
    return Node(block, rest, "lora_A" in inside, bool(inside))


def _add(
    blocks: dict[str, dict[str, Any]],
    nodes: Sequence[Node],
    widths: list[int],
    readers: set[tuple[str, str]],
    source: Path,
) -> None:
    """One group, to the block that it belongs to."""
    if len({(node.block, node.rank) for node in nodes}) != 1:
        raise ConfigError(f"{source}: a group of {nodes[0].name} spans blocks, or ranks and widths")
    block = blocks[nodes[0].block]
    layers = list(dict.fromkeys(node.name for node in nodes))
    block["adapt"] |= dict.fromkeys(node.name for node in nodes if node.adapted)
    attention = all(ATTENTION.search(name) for name in layers)
    if nodes[0].rank:
        group = {"dim": "rank", "of": layers, "choices": widths}
        kind = "attention_rank" if attention else "mlp_rank"
    else:
        found = {_reader(nodes[0].block, name, readers, source) for name in layers}
        group = {"dim": "width", "outputs": layers, "inputs": sorted(found), "choices": widths}
        kind = "mlp_width"
        if attention:  # whole heads, whatever their size
            choices = [width / max(widths) for width in widths]
            group, kind = {**group, "dim": "heads", "choices": choices}, "heads"
    name = kind
    while name in block["groups"]:
        name = f"{kind}_{layers[0].rpartition('.')[2]}"
        kind = name
    block["groups"][name] = group


def _reader(block: str, name: str, readers: set[tuple[str, str]], source: Path) -> str:
    parent, _, leaf = name.rpartition(".")
    near = READERS.get(leaf)
    found = FAR_READERS.get(name) or (near and ".".join(filter(None, (parent, near))))
    if found is None:
        listed = sorted(other for owner, other in readers if owner == block)
        found = listed[0] if len(listed) == 1 else None
    if found is None:
        raise ConfigError(
            f"{source}: which layer of {block} reads the channels of {name} is not known; write "
            "this group by hand (see search_spaces/)"
        )
    return found


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
    dims: set[str],
    stages: Sequence[Mapping[str, Any]],
    training: Mapping[str, Any],
    notes: list[str],
    source: Path,
) -> dict[str, Any]:
    ranks = [
        spec.choices for section in space.sections for spec in section.groups if spec.dim == "rank"
    ]
    order = [dim for dim in ("rank", "width", "heads") if dim in dims]
    found: dict[str, Any] = {"sampling": "lonas", "progressivity": order}
    if ranks:
        found["adapter"] = {"rank": max(max(choices) for choices in ranks)}
    if training.get("sandwich_rule"):
        found["sampling"] = "sandwich"
    declared = []
    for number, stage in enumerate(stages):
        if int(stage.get("depth_indicator", 1)) > 1:
            raise ConfigError(
                f"{source}: stage {number} drops layers (depth_indicator "
                f"{stage['depth_indicator']}); import it with 1 and add a group of dim depth to "
                "the space"
            )
        if stage.get("reorg_weights"):
            found["order"] = "norm"
        own: dict[str, Any] = {"train_dims": order}
        for name, kind in (("epochs", int), ("width_indicator", int), ("init_lr", float),
                           ("epochs_lr", int), ("sample_rate", int)):  # fmt: skip
            if name not in stage:
                continue
            if float(stage[name]) == UNSET:
                notes.append(f"stage {number} leaves {name} open; set it in the training settings")
            else:
                own[name] = kind(stage[name])
        declared.append(own)
    found["stages"] = declared
    return found


def _search(section: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """Accuracy against operations; LoNAS takes the fewest operations above ref_acc - acc_delta."""
    if not section:
        return {}
    algorithm = section.get("algorithm", "NSGA2")
    if algorithm not in SEARCHES:
        raise ConfigError(f"{source}: search algorithm {algorithm}; known: {', '.join(SEARCHES)}")
    found = {
        "sampler": SEARCHES[algorithm],
        "objectives": ["accuracy", "macs"],
        "trials": int(section["num_evals"]),
        "population": int(section["population"]),
    }
    least = float(section.get("ref_acc", UNSET)) - float(section.get("acc_delta", 0))
    if least > 0:
        found["budget"] = {"min_accuracy": round(least, 6)}
    return found
