"""Tiny random pairs of every family, written as ordinary checkpoints; and the oracle that says what is right."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)

from model_store.assembly import Elasticity

FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "phi3", "olmo2", "granite", "gemma3_text", "gpt_neox", "gpt2",
)  # fmt: skip
KEPT = (0, 2, 4, 5)
NUM_TEACHER_LAYERS = 6
VOCAB = 131


def _config(family: str, num_layers: int, tied: bool):
    common = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": num_layers,
        "num_attention_heads": 4, "max_position_embeddings": 256, "tie_word_embeddings": tied, "bos_token_id": 1,
        "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    grouped = common | {"num_key_value_heads": 2}
    if family == "llama":
        scaling = {
            "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
        }  # fmt: skip
        return LlamaConfig(**grouped, rope_parameters=scaling)
    if family == "mistral":
        return MistralConfig(**grouped, sliding_window=None)
    if family == "qwen2":
        return Qwen2Config(**grouped)
    if family == "qwen3":
        return Qwen3Config(**grouped, head_dim=24)
    if family == "smollm3":  # every second layer knows no positions, and has a window
        return SmolLM3Config(**grouped, no_rope_layer_interval=2, use_sliding_window=True, sliding_window=20)
    if family == "phi3":
        part = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}
        return Phi3Config(**grouped, rope_parameters=part, sliding_window=30)
    if family == "olmo2":
        return Olmo2Config(**grouped)
    if family == "granite":
        scales = {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "attention_multiplier": 0.2}
        return GraniteConfig(**grouped, **scales, logits_scaling=0.8)
    if family == "gemma3_text":
        types = ["full_attention" if i % 3 == 1 else "sliding_attention" for i in range(num_layers)]
        return Gemma3TextConfig(
            **grouped, head_dim=24, query_pre_attn_scalar=20, sliding_window=12, layer_types=types, rope_parameters={
                "full_attention": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        )  # fmt: skip
    if family == "gpt_neox":
        return GPTNeoXConfig(**common, rotary_pct=0.5)
    del common["intermediate_size"]
    return GPT2Config(
        vocab_size=VOCAB, n_embd=64, n_layer=num_layers, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=tied,
    )  # fmt: skip


def make_model(family: str, num_layers: int, seed: int, tied: bool = False) -> PreTrainedModel:
    """A random model whose logits are well apart: large weights, and biases and norms that are not trivial."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(_config(family, num_layers, tied), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
            elif "norm" in name or "ln_" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.normal_(0, 0.1)
    return model


def make_pair(folder: Path, family: str = "llama", tied: bool | None = None) -> tuple[Path, Path]:
    """Write a random teacher and student; returns their folders. Tied where the family usually is."""
    tied = family in ("llama", "gpt2", "gemma3_text") if tied is None else tied
    teacher, student = folder / "teacher", folder / "student"
    make_model(family, NUM_TEACHER_LAYERS, seed=1, tied=tied).save_pretrained(teacher)
    make_model(family, len(KEPT), seed=2, tied=tied).save_pretrained(student)
    pruned = [layer for layer in range(NUM_TEACHER_LAYERS) if layer not in KEPT]
    config = {"copied_teacher_layers": list(KEPT), "pruned_teacher_layers": pruned}
    (student / "student_config.json").write_text(json.dumps(config))
    return teacher, student


def layers_of(model: PreTrainedModel) -> torch.nn.ModuleList:
    return model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers


_NORMS = ("norm", "final_layer_norm", "ln_f")


class Oracle:
    """Assembles intermediate models in transformers as the published code does, in float32.

    It patches copies of whole modules: layers, embedding (with learned positions), final norm and head. A tied model
    whose ends differ becomes untied, because each side keeps its own module.
    """

    def __init__(self, teacher: Path | PreTrainedModel, student: Path | PreTrainedModel) -> None:
        self.teacher, self.student = (
            m if isinstance(m, PreTrainedModel)
            else AutoModelForCausalLM.from_pretrained(m, dtype=torch.float32, attn_implementation="eager").eval()
            for m in (teacher, student)
        )  # fmt: skip
        self._models: dict[tuple, PreTrainedModel] = {}
        self._logits: dict[tuple, torch.Tensor] = {}  # every executor is asked for the same texts

    def model(self, elasticity: Elasticity, size: int) -> PreTrainedModel:
        key = self._key(elasticity, size)
        if key not in self._models:
            self._models[key] = self._assemble(elasticity, size)
        return self._models[key]

    def _key(self, elasticity: Elasticity, size: int) -> tuple:
        path = elasticity.path(size)
        return path.layers, path.embed_from, path.norm_from, path.head_from

    def _assemble(self, elasticity: Elasticity, size: int) -> PreTrainedModel:
        path = elasticity.path(size)
        if all(path.teacher_stations):
            return self.teacher
        if not any(path.teacher_stations):
            return self.student
        sides = {"teacher": self.teacher, "student": self.student}
        model = copy.deepcopy(self.teacher)
        base, num_teacher = model.base_model, elasticity.num_teacher_layers
        layers = []
        for position, layer_id in enumerate(path.layers):
            side = self.teacher if layer_id < num_teacher else self.student
            layer = copy.deepcopy(layers_of(side)[layer_id if side is self.teacher else layer_id - num_teacher])
            for module in layer.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = position
            layers.append(layer)
        setattr(base, "h" if hasattr(base, "h") else "layers", torch.nn.ModuleList(layers))
        embed = sides[path.embed_from]
        model.set_input_embeddings(copy.deepcopy(embed.get_input_embeddings()))
        if hasattr(base, "wpe"):
            base.wpe = copy.deepcopy(embed.base_model.wpe)
        norm = next(name for name in _NORMS if hasattr(base, name))
        setattr(base, norm, copy.deepcopy(getattr(sides[path.norm_from].base_model, norm)))
        model.set_output_embeddings(copy.deepcopy(sides[path.head_from].get_output_embeddings()))
        model.config.num_hidden_layers = len(layers)
        if hasattr(model.config, "layer_types") and model.config.layer_types:
            windows = [layer.self_attn.sliding_window for layer in layers]
            model.config.layer_types = ["full_attention" if w is None else "sliding_attention" for w in windows]
            base.has_sliding_layers = "sliding_attention" in model.config.layer_types
        return model

    @torch.no_grad()
    def logits(self, elasticity: Elasticity, size: int, token_ids: list[int]) -> torch.Tensor:
        """[tokens, vocabulary]"""
        key = (*self._key(elasticity, size), *token_ids)
        if key not in self._logits:
            self._logits[key] = self.model(elasticity, size)(torch.tensor([token_ids]), use_cache=False).logits[0]
        return self._logits[key]

    @torch.no_grad()
    def greedy(
        self, elasticity: Elasticity, size: int, token_ids: list[int], num_tokens: int, guess: Sequence[int] = ()
    ) -> list[int]:
        """Greedy continuation. One forward pass tells whether it is `guess`, that is whether each token of that is the
        likeliest after the text before it. If not, each is from a pass over the whole text: nothing is cached."""
        ids = list(token_ids)
        if len(guess) == num_tokens > 0:
            scores = self.logits(elasticity, size, [*ids, *guess[:-1]])[len(ids) - 1 :]
            if scores.argmax(-1).tolist() == list(guess):
                return list(guess)
        for _ in range(num_tokens):
            ids.append(int(self.logits(elasticity, size, ids)[-1].argmax()))
        return ids[len(token_ids) :]
