"""Pairs that are known by name: their hub ids and the patch order their authors use.

Facts from the method's repository (dcml-lab/boomerang-distillation) and paper (arXiv 2510.05064).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PublishedPair:
    """`kept` is given only where the student has no student_config.json of its own."""

    name: str
    teacher: str
    student: str
    patch_order: str
    kept: tuple[int, ...] | None = None


_ORG = "Harvard-DCML"
PUBLISHED = (
    PublishedPair("qwen3-4b", "Qwen/Qwen3-4B-Base", f"{_ORG}/boomerang-qwen3-2.3B", "last_to_first"),
    PublishedPair("qwen3-8b", "Qwen/Qwen3-8B-Base", f"{_ORG}/boomerang-qwen3-4.9B", "last_to_first"),
    PublishedPair("pythia-2.8b", "EleutherAI/pythia-2.8b", f"{_ORG}/boomerang-pythia-1.6B", "last_to_first"),
    PublishedPair("pythia-6.9b", "EleutherAI/pythia-6.9b", f"{_ORG}/boomerang-pythia-3.8B", "last_to_first"),
    PublishedPair("llama-3.2-3b", "meta-llama/Llama-3.2-3B", f"{_ORG}/boomerang-llama-3.2-1.9B", "first_to_last"),
    # DistilGPT2 was distilled by others and never for this; its layers are GPT-2's 0, 2, 4, 7, 9, 11.
    PublishedPair("gpt2", "openai-community/gpt2", "distilbert/distilgpt2", "last_to_first", (0, 2, 4, 7, 9, 11)),
)


def find(name: str) -> PublishedPair | None:
    """The published pair of that name."""
    return next((pair for pair in PUBLISHED if pair.name == name.lower()), None)


def by_student(student: str) -> PublishedPair | None:
    """The published pair whose student has that hub id or folder name."""
    base = student.rstrip("/").rsplit("/", 1)[-1].lower()
    return next((pair for pair in PUBLISHED if pair.student.rsplit("/", 1)[-1].lower() == base), None)


def order_of(student: str) -> str | None:
    pair = by_student(student)
    return pair.patch_order if pair else None
