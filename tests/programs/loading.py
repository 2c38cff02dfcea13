"""Written folders in other versions of transformers, which load them and compute the same.

    python -m tests.programs.loading 4.57.6 5.5.4    (minutes: each makes an environment of its own)

The folders are written here; `read` runs in the other environment, as a file, where nothing of
this project is installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

VERSIONS = ("4.57.6", "5.5.4", "5.23.0", "5.24.0")
FAMILIES = (
    "llama", "llama, tied", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "bloom",
    "falcon", "gpt-neox", "gpt2", "opt", "bert, classes", "roberta", "minilm",
)  # fmt: skip
# Another base than the default's shows whether it is read; Llama 3's frequencies, Phi's part.
OTHER_BASE = {"rope_type": "default", "rope_theta": 500.0}
ROPE = {
    "llama": OTHER_BASE,
    "llama, tied": {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0,
                    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 16},
    "qwen3": OTHER_BASE,
    "phi3": OTHER_BASE | {"partial_rotary_factor": 0.5},
    "gpt-neox": OTHER_BASE | {"partial_rotary_factor": 0.5},
}  # fmt: skip
ELSEWHERE = {("gpt-neox", "mixed")}
"""Its head is called otherwise in 5.23 than before, which is translated by the type of model; of a
type of our own no transformers knows that. Uniform and padded folders load everywhere."""
EXPECTED = "expected.safetensors"
TEXT = "Tom has 3 apples.<|turn|>"


def write(folder: Path) -> None:
    """By family the non-uniform folder with its small class, a uniform and a padded plain one, and
    one of every size, each beside the logits that it computes here."""
    import random

    import torch
    from safetensors.torch import save_file

    from elastic.config import ModelConfig
    from elastic.formats import hf, slices
    from elastic.formats.auto_class import auto_of
    from elastic.formats.padding import padded
    from elastic.spaces.declared import SearchSpace
    from elastic.supernet.compact import compact
    from elastic.supernet.supernet import Supernet
    from tests.helpers import families, tiny

    for family in FAMILIES:
        rope = {"rope_parameters": dict(ROPE[family])} if family in ROPE else {}
        model = families.model_of(family, torch.float32, **rope)
        model.config.use_cache = True
        space = SearchSpace.load(families.FAMILIES[family][1])
        net = Supernet(model, space, tiny.ADAPTERS["lora"])
        sub = net.space.random(random.Random(3))
        assert not tiny.is_uniform(net.space, sub)
        tiny.randomize_(net)
        small = compact(net, sub)
        forms = {
            "mixed": small,
            "uniform": compact(net, net.space.heuristic()),
            "padded": padded(small, net.space, sub),
            "sizes": small,
        }
        for form, each in forms.items():
            place = folder / f"{family.replace(', ', '-')}-{form}"
            if (family, form) in ELSEWHERE:
                continue
            if form == "uniform" and not hf.is_plain(each):
                continue
            tokenizer = tiny.tokenizer()
            tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
            tokenizer.chat_template = "{{ messages[0].content }}"
            if form == "sizes":
                one = slices.Slice("small", sub, small, {"params": 0, "macs": 0})
                slices.write(net, tokenizer, [one], place, dtype=torch.float32,
                             model=ModelConfig(path="tiny"))  # fmt: skip
            else:
                hf.write(each, tokenizer, place)
            ids = tiny.tokens()
            save_file({"ids": ids, "logits": families.output(each).detach()}, place / EXPECTED)
            (place / "form.json").write_text(
                json.dumps(
                    {
                        "auto": auto_of(type(each).__name__),
                        "attention": each.config._attn_implementation,
                        "arguments": {"slice": "small"} if form == "sizes" else {},
                    }
                )
            )
            tokens = tokenizer(TEXT)["input_ids"]
            (place / "tokens.json").write_text(json.dumps(tokens))


def read(folder: Path) -> None:
    """Load every folder with this interpreter's transformers; AssertionError names a wrong one."""
    import torch
    import transformers
    from safetensors.torch import load_file

    torch.set_num_threads(1)
    for place in sorted(path.parent for path in folder.glob(f"*/{EXPECTED}")):
        form = json.loads((place / "form.json").read_text())
        auto = form["auto"]
        code = {"trust_remote_code": True} if (place / "modeling_elastic.py").exists() else {}
        model = (
            getattr(transformers, auto)
            .from_pretrained(
                place, attn_implementation=form["attention"], **form["arguments"], **code
            )
            .eval()
        )
        expected = load_file(place / EXPECTED)
        with torch.no_grad():
            found = model(input_ids=expected["ids"]).logits
        gap = float((found - expected["logits"]).abs().max() / expected["logits"].abs().max())
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, **code)
        tokens = tokenizer(TEXT)["input_ids"]
        kind, version = type(model).__name__, transformers.__version__
        print(f"{version}  {place.name:24} {kind:36} {gap:.1e} {tokenizer.__class__.__name__}")
        assert gap < 1e-5, f"{place.name}: logits differ by {gap:.1e} of the largest"
        # Of this type 5.23 takes its own class, whatever the folder says; the tests' is another.
        if model.config.model_type == "qwen2":
            continue
        assert tokens == json.loads((place / "tokens.json").read_text()), place.name
        chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        assert chat == "Hi" and "<|turn|>" in tokenizer.all_special_tokens, place.name
        if hasattr(model, "generate") and "Causal" in auto:
            once = {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
            with torch.no_grad():
                short, long = (
                    model.generate(expected["ids"][:1], use_cache=cached, **once)
                    for cached in (True, False)
                )
            assert torch.equal(short, long), f"{place.name}: the cache changes the answer"


def environment(version: str, below: Path) -> Path:
    """The interpreter of an environment with torch as here and that transformers."""
    from importlib import metadata

    place = below / version
    python = place / "bin" / "python"
    if not python.exists():
        venv.create(place, with_pip=True)
        torch = "torch==" + metadata.version("torch").partition("+")[0]
        for packages in ([torch], [f"transformers=={version}", "safetensors"]):
            subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    return python


def check(version: str, folder: Path, below: Path) -> str:
    """What reading prints in that version; RuntimeError with what it said if it fails."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    # Code of the folders is copied into the cache of modules: not into that of the user.
    clean |= {"HF_HOME": str(below / f"cache-{version}"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [environment(version, below), Path(__file__), str(folder)],
        env=clean, cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(f"transformers {version}:\n{done.stdout}\n{done.stderr}")
    return done.stdout


if __name__ == "__main__":
    if Path(sys.argv[-1]).is_dir():
        read(Path(sys.argv[-1]))
    else:
        cache = Path(os.environ.get("ELASTIC_CACHE", tempfile.gettempdir())) / "loading"
        with tempfile.TemporaryDirectory() as written:
            write(Path(written))
            for asked in sys.argv[1:] or VERSIONS:
                print(check(asked, Path(written), cache), end="")
