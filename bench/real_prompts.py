"""Prompts of real benchmarks for the benches of scoring, and the harness's own model class as the other side.

Texts are MMLU's and BIG-Bench Hard's, read from a folder of shared files that is not part of the project; a byte-level
tokenizer is trained on other text there, so that prompts have about the length in tokens that they have on the real
model. Weights are random: speed does not depend on them.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from bench.setting import gpt2_small
from manyedits.model import EditableModel

SHARED = Path(os.environ.get("MANYEDITS_SHARED", Path(__file__).resolve().parents[2] / "shared"))
LETTERS = "ABCD"
BATCH = 16


def rows(path: str) -> list[dict[str, Any]]:
    """A JSON Lines file of the shared folder."""
    content = (SHARED / "data" / path).read_bytes()
    text = gzip.decompress(content) if path.endswith(".gz") else content
    return [json.loads(line) for line in text.splitlines()]


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with 32,000 entries, trained on encyclopedia text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    end = "<|endoftext|>"
    trainer = trainers.BpeTrainer(
        vocab_size=32000,
        special_tokens=[end],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [" ".join(str(v) for v in row.values()) for row in rows("wikipedia_en_2015_sample/wiki_sample.jsonl.gz")]
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end, pad_token=end)


def model() -> EditableModel:
    """GPT-2 small's shape with the attention that transformers chooses by itself."""
    hf = gpt2_small()
    hf.set_attn_implementation("sdpa")
    return EditableModel.wrap(hf, tokenizer())


def referee(model: EditableModel) -> HFLM:
    """The harness's own model class on the same weights."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return HFLM(pretrained=model.hf, tokenizer=model.tokenizer, batch_size=BATCH, device="cpu")


def request(kind: str, *args: Any) -> Instance:
    """What the harness hands to a model class."""
    return Instance(kind, {}, args, 0)  # type: ignore[arg-type]


# --- MMLU, 5 examples -----------------------------------------------------------------------------------------------


def mmlu(subjects: tuple[str, ...], items: int) -> list[tuple[str, str]]:
    """Context and letter, four per item, as the harness renders them at 5 shots."""
    examples, questions = rows("mmlu/dev.jsonl"), rows("mmlu/test.jsonl.gz")
    pairs = []
    for subject in subjects:
        head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
        head += "".join(f"{_mmlu(e)} {e['answer']}\n\n" for e in examples if e["subject"] == subject)
        asked = [q for q in questions if q["subject"] == subject][:items]
        pairs += [(head + _mmlu(q), f" {letter}") for q in asked for letter in LETTERS]
    return pairs


def _mmlu(row: dict[str, Any]) -> str:
    options = "".join(f"{letter}. {row[letter]}\n" for letter in LETTERS)
    return f"{row['question'].strip()}\n{options}Answer:"


# --- BIG-Bench Hard, 3 worked examples ------------------------------------------------------------------------------


def bbh(tasks: tuple[str, ...], items: int) -> list[str]:
    """Prompts with the published worked examples."""
    prompts = []
    for task in tasks:
        text = (SHARED / "data" / "bbh" / "cot-prompts" / f"{task}.txt").read_text(encoding="utf-8")
        head = text.partition("-----\n")[2].strip()
        asked = json.loads((SHARED / "data" / "bbh" / "bbh" / f"{task}.json").read_text(encoding="utf-8"))["examples"]
        prompts += [f"{head}\n\nQ: {q['input']}\nA: Let's think step by step.\n" for q in asked[:items]]
    return prompts
