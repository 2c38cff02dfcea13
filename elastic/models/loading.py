"""Base models: finding one, checking that it is there, loading it, naming its weights."""

from __future__ import annotations

import contextlib
import functools
import logging
import textwrap
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import torch
import transformers
from huggingface_hub.errors import GatedRepoError

from elastic.config import ModelConfig
from elastic.console import busy, logging_at, say, track
from elastic.errors import ModelError
from elastic.models import wrappers
from elastic.models.compat import BROKEN
from elastic.models.digest import FETCH, digest_of, weights_in
from elastic.models.from_gguf import SUFFIX
from elastic.models.head import describe_, last_layer, start_head_
from elastic.models.kinds import Kind, exact_, kind_of_architecture, require, was_trained
from elastic.models.modules import as_cut_, linear_, of_family_
from elastic.models.packaged import PACKAGED, converted, unpacked
from elastic.plain import one_line

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Base:
    """A model in memory with its tokenizer and the digest of its weights on disk."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    digest: str


ADAPTER = "adapter_config.json"
"""What PEFT writes beside an adapter."""
EVERYTHING = ("*.json", "*.safetensors", "*.model", "*.jinja")
"""What of a hub repository a model is loaded from."""


def locate(path: str, files: Sequence[str] = EVERYTHING) -> str:
    """A folder that transformers can load, from a hub name with at least these files; ModelError
    if there is none."""
    if path in PACKAGED:
        return str(unpacked(path))
    if Path(path).exists() or path.startswith((".", "/", "~")):
        folder = Path(path).expanduser()
        if folder.is_file() and folder.suffix == SUFFIX:
            return str(converted(folder))
        if not (folder / "config.json").is_file():
            file = next(iter(sorted(folder.glob(f"*{SUFFIX}"))), f"a {SUFFIX} file")
            raise ModelError(
                f"model.path {path}: no config.json there; give a model folder, or {file}"
            )
        return str(folder)
    if path.count("/") != 1:
        raise ModelError(
            f"model.path {path!r}: no such folder; give a folder, a {SUFFIX} file, a hub name "
            f"(owner/name), or one of {', '.join(PACKAGED)}"
        )
    return from_hub(path, files, "model.path")


def from_hub(name: str, files: Sequence[str], setting: str) -> str:
    """The folder with these files of a repository (owner/name); ModelError, which names the setting
    that asked for it, if it cannot be had."""
    try:
        with busy(f"fetching {name}", own_bars=True):
            return huggingface_hub.snapshot_download(name, allow_patterns=list(files))
    except GatedRepoError:
        raise ModelError(
            f"{setting} {name!r}: the hub gives it to those alone whom its owner lets; ask at "
            f"https://huggingface.co/{name}, then run `hf auth login`, or set HF_TOKEN"
        ) from None
    except Exception as error:  # the hub client raises many kinds; all mean: not there
        raise ModelError(f"{setting} {name!r}: neither a folder nor on the hub: {error}") from None


def skeleton(config: ModelConfig, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model with its real modules (GPT-2's Conv1D as linear layers) and no memory: enough to
    bind a search space to, and to know what ends what it generates. In the type of its
    configuration unless one is given."""
    folder = locate(config.path, ["config.json", transformers.utils.GENERATION_CONFIG_NAME])
    architecture = _described(folder, config)
    kind = kind_of_architecture(architecture, config.head)
    if config.classes:
        describe_(architecture, config.classes)
    with torch.device("meta"), _readable(folder, config, "no model can be made of config.json"):
        model = _auto_class(kind, architecture).from_config(
            architecture,
            dtype=dtype or architecture.dtype,
            trust_remote_code=config.trust_remote_code,
        )
    if model.can_generate():
        with contextlib.suppress(OSError):  # without the file, as config.json says
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return exact_(linear_(as_cut_(model)))


def architecture_of(config: ModelConfig) -> PretrainedConfig:
    """The model's own configuration, as its family has it; reads no weights, and downloads none."""
    return of_family_(_described(locate(config.path, ["config.json"]), config))


def _described(folder: str, config: ModelConfig) -> PretrainedConfig:
    """As the folder says."""
    with _readable(folder, config, "config.json cannot be read"):
        auto = transformers.AutoConfig
        found = auto.from_pretrained(folder, trust_remote_code=config.trust_remote_code)
        named = found.architectures or []
        if not (isinstance(named, list) and all(isinstance(name, str) for name in named)):
            raise TypeError(f"architectures is {named!r}, no list of names")
        return found


@contextlib.contextmanager
def _readable(
    folder: str, config: ModelConfig, what: str, remedy: str | None = None
) -> Iterator[None]:
    """ModelError for whatever transformers raises while it reads the folder, with what would work:
    unless another remedy is given, a model that it knows."""
    try:
        yield
    except Exception as error:  # the library and those it reads files with raise many kinds
        known = f"give a model that transformers {transformers.__version__} knows"
        # Of a processor's code nothing is run here.
        files = [Path(folder) / name for name in ("config.json", "tokenizer_config.json")]
        brings_code = any(file.is_file() and b'"auto_map"' in file.read_bytes() for file in files)
        if brings_code and not config.trust_remote_code:
            remedy = (
                "it brings Python code of its own: read that, then give --model.trust_remote_code "
                "true to run it"
            )
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder=" ...")
        raise ModelError(
            f"model.path {config.path}: {what}: {reason}; {remedy or known}"
        ) from error


def kind_of_base(config: ModelConfig) -> Kind:
    """How this model answers; reads no weights."""
    return kind_of_architecture(architecture_of(config), config.head)


def regresses(config: ModelConfig) -> bool:
    """Whether this model answers with a number; reads no weights."""
    architecture = architecture_of(config)
    saved = was_trained(architecture) and len(architecture.id2label) == 1
    return config.head == "regression" or (config.head == "auto" and saved)


def _auto_class(kind: Kind, architecture: PretrainedConfig) -> Any:
    if kind is Kind.DECODER and (whole := wrappers.auto_for(architecture)):
        return getattr(transformers, whole)
    return {
        Kind.CLASSIFIER: transformers.AutoModelForSequenceClassification,
        Kind.ENCODER_DECODER: transformers.AutoModelForSeq2SeqLM,
    }.get(kind, transformers.AutoModelForCausalLM)


def load(config: ModelConfig, seed: int = 0) -> Base:
    """Weights, tokenizer and digest."""
    folder = locate(config.path)
    model = load_model(folder, config, seed)
    return Base(model, load_tokenizer(config), digest_of(folder))


def load_model(folder: str, config: ModelConfig, seed: int = 0) -> PreTrainedModel:
    """The model in a folder, frozen, in evaluation mode, on the device; GPT-2's Conv1D as linear
    layers. A classification head that was not saved for these classes starts from the seed.
    ModelError for pickled weights, an adapter, or what cannot be read."""
    architecture = _described(folder, config)
    require(config, architecture)
    weights_in(folder)
    if (Path(folder) / ADAPTER).is_file():  # the library would load another base, and put it on
        raise ModelError(
            f"model.path {config.path}: {ADAPTER} is there, so it is an adapter; give its base, "
            "and the adapter with --adapter.from"
        )
    if strange := set(architecture.architectures or ()) & set(BROKEN):
        release = transformers.__version__
        say(
            f"{config.path}: transformers {release} cannot run {strange.pop()}, so its language "
            "model alone is loaded, and what is written reads text alone"
        )
    device = usable_device(config.device)
    dtype = resolve_dtype(config.dtype, device)
    settings: dict[str, Any] = {"dtype": dtype}
    kind = kind_of_architecture(architecture, config.head)
    if kind is Kind.CLASSIFIER:
        with busy(f"loading {config.path}"), counted():
            return _load_classifier(folder, config, architecture, dtype, seed).to(device)
    if config.quantise != "none":
        from elastic.models import quantised

        whole = []
        if wrappers.auto_for(architecture):  # what is no part of its language model stays as it is
            empty = skeleton(config)
            whole = [*wrappers.outside(empty), *wrappers.head_names(empty)]
        settings = quantised.loading(config.quantise, architecture.dtype, device, whole)
    telling, what = busy(f"loading {config.path}"), "the weights cannot be loaded"
    with telling, counted(), _readable(folder, config, what, FETCH):
        model = _auto_class(kind, architecture).from_pretrained(
            folder, trust_remote_code=config.trust_remote_code, use_safetensors=True, **settings
        )
    if config.quantise != "none":
        model = quantised.adopt_(model, dtype)
    return exact_(linear_(as_cut_(model))).to(device).eval().requires_grad_(False)


@contextlib.contextmanager
def counted() -> Iterator[None]:
    """Inside, what transformers loads and writes is counted as everything here is; its own bars
    would stay behind."""

    def ours(bar: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args and isinstance(args[0], Collection):
            return track(args[0], str(kwargs.get("desc") or "weights").lower())
        return bar(*args, **{**kwargs, "disable": True})

    before = transformers.utils.logging.set_tqdm_hook(ours)
    try:
        yield
    finally:
        transformers.utils.logging.set_tqdm_hook(before)


def _load_classifier(
    folder: str,
    config: ModelConfig,
    architecture: PretrainedConfig,
    dtype: torch.dtype,
    seed: int,
) -> PreTrainedModel:
    trained, before = was_trained(architecture), dict(architecture.id2label)
    kept = describe_(architecture, config.classes)
    # The padding that batches get: decoders look for the end of a text by it.
    architecture.pad_token_id = load_tokenizer(config).pad_token_id
    # transformers asks that a head be trained that is about to be.
    quiet = logging_at("transformers", logging.ERROR)
    with quiet, _readable(folder, config, "the weights cannot be loaded", FETCH):
        model, found = _auto_class(Kind.CLASSIFIER, architecture).from_pretrained(
            folder, trust_remote_code=config.trust_remote_code, config=architecture, dtype=dtype,
            use_safetensors=True, ignore_mismatched_sizes=True, output_loading_info=True,
        )  # fmt: skip
    missing = {*found["missing_keys"], *(key for key, *_ in found["mismatched_keys"])}
    if trained and not kept:
        names = ", ".join(map(str, list(before.values())[:8]))
        say(f"The head of {config.path} knows {names}; one for {', '.join(config.classes[:8])} "
            "starts anew")  # fmt: skip
        missing |= last_layer(model)
    start_head_(model, missing, seed)
    return linear_(as_cut_(model)).eval().requires_grad_(False)


def stored_dtype(config: ModelConfig) -> torch.dtype | None:
    """The type the weights were saved in, as the checkpoint's config says."""
    architecture = architecture_of(config)
    return architecture.dtype or wrappers.text_config(architecture).dtype


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The base's tokenizer, with padding; ModelError if it cannot be read, or ends no answer."""
    folder = locate(config.path)
    with _readable(folder, config, "the tokenizer cannot be loaded", FETCH):
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=config.trust_remote_code
        )
    if tokenizer.eos_token_id is None and kind_of_base(config) is not Kind.CLASSIFIER:
        raise ModelError(f"model.path {config.path}: the tokenizer has no end-of-sequence token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def resolve_device(name: str) -> torch.device:
    """The device of that name, "auto" a GPU where there is one; ModelError if torch knows none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ModelError(f"model.device {name!r}: {error}") from None


def usable_device(name: str) -> torch.device:
    """The same; ModelError where it is not there, or holds no values (meta)."""
    device = resolve_device(name)
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"device {name!r} cannot be used here: {one_line(error)}") from None
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The type of that name, "auto" bfloat16 where the device is faster with it."""
    if name != "auto":
        return getattr(torch, name)
    return torch.bfloat16 if _bfloat16_is_faster(str(device)) else torch.float32


@functools.cache
def _bfloat16_is_faster(device: str) -> bool:
    """Whether the processor has matrix units for it, as it says itself. One that says neither is
    timed: without them bfloat16 may be ten times slower."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported()
    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if known.get("amx_bf16"):
        return True
    if known.get("architecture") == "x86_64" and not known.get("avx512_bf16"):
        return False

    def seconds(dtype: torch.dtype) -> float:
        x = torch.ones(256, 512, dtype=dtype, device=device)
        w = torch.ones(512, 512, dtype=dtype, device=device)
        times = []
        for _ in range(4):
            start = time.perf_counter()
            x @ w
            times.append(time.perf_counter() - start)
        return min(times)

    return seconds(torch.bfloat16) < 0.67 * seconds(torch.float32)
