"""Language models for tests of prompt writing: two scripted ones, and a tiny random Llama."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from clouds.generation.prompt_writing import CLASS_DESCRIPTIONS

THINGS = {
    "road": "an avenue", "sidewalk": "a sidewalk", "building": "a church", "wall": "a brick wall",
    "fence": "a fence", "pole": "a lamp post", "traffic light": "a traffic light",
    "traffic sign": "a stop sign", "vegetation": "an oak", "terrain": "a lawn", "sky": "the sky",
    "person": "a pedestrian", "rider": "a motorcyclist", "car": "a sedan", "truck": "a lorry",
    "bus": "a minibus", "train": "a tram", "motorcycle": "a moped", "bicycle": "a tandem",
}  # fmt: skip
NOISE = [a + b + c + d for a in "bdfgk" for b in "aeiou" for c in "lmnrt" for d in "aeiou"]


class ObedientModel:
    """Writes the requested classes, with random words so that no two lines are similar."""

    def __init__(self, interrupt_after: int | None = None):
        self.calls: list[tuple[tuple[str, ...], int]] = []
        self.interrupt_after = interrupt_after

    def answer(self, instructions, seed):
        if len(self.calls) == self.interrupt_after:
            raise KeyboardInterrupt
        self.calls.append((tuple(instructions), seed))
        rng = np.random.default_rng(seed)
        return [self.one(text, rng) for text in instructions]

    @staticmethod
    def one(text, rng):
        requested = [THINGS[name] for name, words in CLASS_DESCRIPTIONS.items() if words in text]
        words = [" ".join(rng.choice(NOISE, 8)) for _ in range(5)]
        lines = [f"{i + 1}. A photo of {', '.join(requested)} {w}." for i, w in enumerate(words)]
        return "\n".join(["Here are your lines:", *lines])


class ScriptedModel:
    """Gives fixed answers, one list per round; the last list is repeated."""

    def __init__(self, *rounds: list[str]):
        self.rounds = list(rounds)

    def answer(self, instructions, seed):
        answers = self.rounds.pop(0) if len(self.rounds) > 1 else self.rounds[0]
        return (answers * len(instructions))[: len(instructions)]


VOCABULARY = (
    "<pad> <s> </s> <unk> a the red bus car tram wall fence street in on rain night . , beside "
    "write user assistant"
).split()
TEMPLATE = (
    "{% for m in messages %}<s> {{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% endif %}"
)


def save_tiny_llama(folder: Path, template: str | None) -> Path:
    """Save a tiny random Llama with a word tokenizer, with or without a chat template."""
    import tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    inner = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="<unk>")
    )
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=512, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    return folder
