"""Changes of a checkpoint's folder, as people, tools and accidents make them."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Change = Callable[[Path], None]


def config(**changes) -> Change:
    def change(folder):
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def without(*keys, **changes) -> Change:
    def change(folder):
        file = folder / "config.json"
        values = {k: v for k, v in json.loads(file.read_text()).items() if k not in keys}
        file.write_text(json.dumps(values | changes))

    return change


def old(**scaling) -> Change:
    """Rotary embedding as transformers 4 spells it."""
    return without("rope_parameters", rope_theta=10000.0, rope_scaling=scaling or None)


def rope(**parameters) -> Change:
    return config(rope_parameters={"rope_theta": 10000.0} | parameters)


def tensors(make: Callable[[dict], dict]) -> Change:
    def change(folder):
        file = folder / "model.safetensors"
        save_file({k: v.contiguous() for k, v in make(load_file(file)).items()}, file, {"format": "pt"})

    return change


def shape(name: str, *sizes: int) -> Change:
    """A tensor of another shape."""
    return tensors(lambda found: found | {name: torch.randn(*sizes)})


def add(**more) -> Change:
    return tensors(lambda found: found | {name.replace("__", "."): value for name, value in more.items()})


def drop(part: str) -> Change:
    return tensors(lambda found: {name: value for name, value in found.items() if part not in name})


def stored_as(dtype: torch.dtype) -> Change:
    return tensors(lambda found: {name: value.to(dtype) for name, value in found.items()})


def own_head(folder):
    name = "embed_out.weight" if "gpt_neox" in (folder / "config.json").read_text() else "lm_head.weight"
    head = torch.randn(131, 64, generator=torch.Generator().manual_seed(3)) * 0.2
    tensors(lambda found: found | {name: head})(folder)


def head_only(folder):
    """The one table of a tied model, saved as the head."""
    names = {"transformer.wte.weight": "lm_head.weight", "model.embed_tokens.weight": "lm_head.weight",
             "gpt_neox.embed_in.weight": "embed_out.weight"}  # fmt: skip
    tensors(lambda found: {names.get(name, name): value for name, value in found.items()})(folder)


def head_copied(folder):
    found = load_file(folder / "model.safetensors")
    embed = next(v for k, v in found.items() if k.endswith(("wte.weight", "embed_tokens.weight")))
    save_file(found | {"lm_head.weight": embed.clone()}, folder / "model.safetensors", {"format": "pt"})


def write(name: str, content: str | bytes) -> Change:
    def change(folder):
        data = content.encode() if isinstance(content, str) else content
        (folder / name).write_bytes(data)

    return change


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"


def instead(name: str, make: Callable[[Path], object]) -> Change:
    """Something else under a file's name."""

    def change(folder):
        (folder / name).unlink()
        make(folder / name)

    return change


def sharded(index: object | None = None) -> Change:
    """The file as a shard; `index` is the content of its index, None for the right one."""

    def change(folder):
        file = folder / "model.safetensors"
        names = load_file(file)
        file.rename(folder / "model-00001.safetensors")
        content = (
            {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001.safetensors")} if index is None else index
        )
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / "model.safetensors.index.json").write_text(text)

    return change


def both(*changes: Change) -> Change:
    def change(folder):
        for one in changes:
            one(folder)

    return change


def quantised(**values) -> Change:
    return config(quantization_config=values)
