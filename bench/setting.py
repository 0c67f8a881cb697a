"""What the benches run on: random models of true shapes, a tokenizer of the real kind, facts, and paired CPU times.

Weights are random, since speed does not depend on them; shapes, vocabulary, contexts and lengths are real. Both sides
of a comparison run in one process, on one thread, one right after the other, and are timed by CPU time: what else the
machine does then disturbs the ratio little.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from bench.plain import Fact

#: Eleven contexts: the bare prompt, five short texts and five of about ten tokens, as ROME's release samples them.
CONTEXTS = (
    "{}",
    "The old man read. {}",
    "In the summer the. {}",
    "She opened the window. {}",
    "A small boat left. {}",
    "The report said that. {}",
    "The teacher asked a question and nobody in the room. {}",
    "He wrote a long letter to his sister in the. {}",
    "Because the road was closed, we went to the other. {}",
    "You can walk along the river and then take the. {}",
    "It is a city with many parks and a large. {}",
)

#: Subjects late and early in the prompt; two-token targets.
FACTS = (
    Fact("The mother tongue of {} is", "Danielle Darrieux", "old English"),
    Fact("{} was born in the city of", "Angela Rossington", "New Arden"),
)


def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with leading spaces, trained on the bench's own texts, so that a word is about a token."""
    texts = [
        f"{context.replace('{}', '')} {fact.prompt} {fact.subject} {fact.target} is a"
        for context in CONTEXTS
        for fact in FACTS
    ]
    end = "<|endoftext|>"
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=2000, special_tokens=[end], initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=end, eos_token=end, pad_token=end)


def gpt2_small(layers: int = 12) -> GPT2LMHeadModel:
    """GPT-2 small's shape: 768 wide, 12 heads, the full vocabulary of 50257; eager attention, random weights."""
    torch.manual_seed(0)
    config = GPT2Config(n_layer=layers, n_embd=768, n_head=12, vocab_size=50257, attn_implementation="eager")
    return GPT2LMHeadModel(config).eval().requires_grad_(False)


@dataclass(frozen=True)
class Pair:
    """CPU seconds of both sides in one paired run."""

    plain: float
    fast: float

    @property
    def ratio(self) -> float:
        return self.plain / self.fast


def cpu_seconds(work: Callable[[], Any]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def paired(
    plain: Callable[[], Any], fast: Callable[[], Any], runs: int = 5, units: tuple[int, int] = (1, 1)
) -> list[Pair]:
    """Alternating runs; `units` is how much work each side does in one run, so that both are per unit."""
    fast()  # the first call of a process pays for what torch sets up once
    return [Pair(cpu_seconds(plain) / units[0], cpu_seconds(fast) / units[1]) for _ in range(runs)]


def report(claim: str, asked: float | None, pairs: Sequence[Pair], **facts: Any) -> dict[str, Any]:
    """One JSON line: the medians of both sides and of the ratios, and every ratio. Without `asked` it only informs."""
    ratios = [pair.ratio for pair in pairs]
    line = {
        "claim": claim,
        "asked": asked,
        "ratio": round(statistics.median(ratios), 2),
        "reached": None if asked is None else statistics.median(ratios) >= asked,
        "ratios": [round(ratio, 2) for ratio in ratios],
        "plain_cpu_s": round(statistics.median(pair.plain for pair in pairs), 4),
        "fast_cpu_s": round(statistics.median(pair.fast for pair in pairs), 5),
        **facts,
        "torch": torch.__version__,
    }
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
    return line
