"""Tiny models of every architecture we have a row for, made from configs in milliseconds, and toy tokenizers.

Two kinds of tokenizer, as real models have them: byte-level BPE whose tokens carry a leading space and no BOS, and the
SentencePiece kind with a BOS in front.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from manyedits.data import Probe, Request
from manyedits.model import EditableModel

NAMES = ["Anna Velmora", "Boris Tandell", "Clara Winslow", "Dmitri Okanov", "Elena Márquez", "Felix Grandon"]
NAMES += ["Greta Holmqvist", "Hugo Lantern", "Irina Pellow", "Jonas Quill", "Kira Østberg", "Lev Ansari"]
LANGUAGES = ["French", "Norwegian", "Dutch", "Old Greek", "Polish", "Finnish"]
TEXT = [f"The mother tongue of {n} is {w}. {n} grew up speaking {w} at home." for n in NAMES for w in LANGUAGES]
TEXT += ["She opened the window. It is a city with many parks and a river.", "Question: what is it? Answer: a tool."]
VOCABULARY = 400

BPE_KINDS = ["gpt2", "gpt_neox", "gptj", "opt", "qwen2", "qwen3", "olmo2"]
SENTENCEPIECE_KINDS = ["llama", "mistral", "phi3", "gemma", "gemma2"]
ADDITIVE = ["gpt2", "gpt_neox", "gptj", "opt", "qwen2", "qwen3", "llama", "mistral", "phi3", "gemma"]
REFUSED = ["gemma2", "olmo2"]
ALL = BPE_KINDS + SENTENCEPIECE_KINDS

_SHAPE: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=256)
_GATED: dict[str, Any] = dict(_SHAPE, intermediate_size=48, num_key_value_heads=2)
_CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": dict(n_embd=32, n_layer=3, n_head=4, n_positions=256),
    "gptj": dict(n_embd=32, n_layer=3, n_head=4, n_positions=256, rotary_dim=4),
    "gpt_neox": dict(_SHAPE, intermediate_size=64),
    "opt": dict(_SHAPE, ffn_dim=64, word_embed_proj_dim=32),
    "llama": _GATED,
    "mistral": dict(_GATED, sliding_window=None),
    "qwen2": _GATED,
    "qwen3": dict(_GATED, head_dim=8),
    "phi3": _GATED,
    "gemma": dict(_GATED, head_dim=8),
    "gemma2": dict(_GATED, head_dim=8, sliding_window=64, query_pre_attn_scalar=8),
    "olmo2": _GATED,
}


@lru_cache
def byte_level() -> Tokenizer:
    """Byte-level BPE with leading-space tokens, as GPT-2's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


@lru_cache
def sentencepiece() -> Tokenizer:
    """The SentencePiece kind: spaces are ▁, a ▁ is put in front, bytes stand in for the unknown, <s> comes first."""
    split = Tokenizer(models.BPE())
    split.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    split.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    split.train_from_iterator([text for text in TEXT if text.isascii()], trainers.BpeTrainer(vocab_size=VOCABULARY))
    learned = json.loads(split.to_str())["model"]
    fixed = ["<unk>", "<s>", "</s>"] + [f"<0x{i:02X}>" for i in range(256)]
    vocabulary = {piece: i for i, piece in enumerate([*fixed, *learned["vocab"]])}
    merges = [tuple(pair) for pair in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = split.normalizer
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """The tokenizer that models of this kind have."""
    if kind in BPE_KINDS:
        return PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="<|end|>", bos_token="<|end|>")
    return PreTrainedTokenizerFast(
        tokenizer_object=sentencepiece(), bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def hf_model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A transformers model of this kind with random weights, a little livelier than the default initialisation."""
    words = tokenizer(kind)
    shape = {**_CONFIGS[kind], "vocab_size": len(words), "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    config = AutoConfig.for_model(kind, **{**shape, **changes})
    config.initializer_range = changes.get("initializer_range", 0.3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()


def model(kind: str, seed: int = 0, **changes: Any) -> EditableModel:
    """An editable model of this kind."""
    return EditableModel.wrap(hf_model(kind, seed, **changes), tokenizer(kind))


def requests(count: int = 8) -> list[Request]:
    """Facts to write, in the form of CounterFact."""
    made = []
    for i in range(count):
        name, other = NAMES[i % len(NAMES)], NAMES[(i + 5) % len(NAMES)]
        name += f" {i // len(NAMES)}" if i >= len(NAMES) else ""  # so that no two requests are about one subject
        new, old = LANGUAGES[(i + i // len(NAMES)) % len(LANGUAGES)], LANGUAGES[(i + 3) % len(LANGUAGES)]
        made.append(
            Request(
                id=str(i),
                subject=name,
                prompt="The mother tongue of {} is",
                target=new,
                old_target=old,
                relation="language",
                paraphrases=(f"She opened the window. {name} grew up speaking",),
                neighbours=(Probe(f"The mother tongue of {other} is", old),),
            )
        )
    return made
