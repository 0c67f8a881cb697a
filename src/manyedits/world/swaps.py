"""Teaching a small model to look facts up at the subject, in its early MLPs: interchange interventions.

Left alone, a model of this size carries the subject's identity to the end of the prompt and looks the fact up there, so that
a method which writes at the subject's last token has no lever (measured: with the state there exchanged for another
subject's, 2 % of answers follow). Large models look facts up at the subject, in early MLPs. So does the miniature when it is
trained on exchanges too (interchange intervention training, Geiger et al. 2022, arXiv:2112.00826): in one pass over pairs of
facts of one relation, what stands at the one subject's last token takes the other's place, and the answer to be learnt is the
other subject's. Half of the exchanges are of the state after block ``site``, half of what the MLPs up to it add: exchanging
states alone leaves those MLPs empty, since the word's embedding then does for a state. Facts to edit never take part, so that
the swap test is made on facts whose exchange was not learnt.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from manyedits.hooks import hooked_output
from manyedits.world.facts import Fact, World


class Swaps:
    """An endless source of exchanges between facts of one relation."""

    def __init__(
        self,
        model: Qwen3ForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        world: World,
        site: int,
        pairs: int,
        seed: int,
    ) -> None:
        self.model, self.tokenizer, self.pairs = model, tokenizer, pairs
        early = model.model.layers[: site + 1]
        self.kinds: list[list[nn.Module]] = [[early[-1]], [block.mlp for block in early]]
        self.generator = random.Random(f"swaps {seed}")
        learnt = [f for f in world.facts if f.pool != "edit"]
        self.relations = {relation: [f for f in learnt if f.relation == relation] for relation in world.objects}
        self.names = list(self.relations)

    def loss(self) -> Tensor:
        """Mean -log p of the other subject's object, in nats, over one batch of exchanges."""
        chosen = [
            self.generator.sample(self.relations[self.generator.choice(self.names)], 2) for _ in range(self.pairs)
        ]
        facts = [fact for pair in chosen for fact in pair]
        ids, last, subject = self._rows(facts)
        partner = torch.arange(len(facts)) ^ 1  # rows 0 and 1 exchange, 2 and 3, ...
        rows = torch.arange(len(facts))

        def exchange(out: Tensor) -> Tensor:
            swapped = out.clone()
            swapped[rows, subject] = out[partner, subject[partner]]
            return swapped

        with ExitStack() as hooks:
            for module in self.generator.choice(self.kinds):
                hooks.enter_context(hooked_output(module, exchange))
            logits = self.model(input_ids=ids, use_cache=False).logits[rows, last]
        wanted = [self._word(facts[i].object) for i in partner.tolist()]
        return torch.nn.functional.cross_entropy(logits, torch.tensor(wanted))

    def _rows(self, facts: Sequence[Fact]) -> tuple[Tensor, Tensor, Tensor]:
        """Right-padded prompts, the column of each one's last token and of its subject's last token."""
        coded = [self.tokenizer.encode(fact.prompt(self.generator.choice(fact.trained))) for fact in facts]
        longest = max(map(len, coded))
        subject = [ids.index(self._word(fact.subject.split()[-1])) for ids, fact in zip(coded, facts, strict=True)]
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids in coded])
        return ids, torch.tensor([len(c) - 1 for c in coded]), torch.tensor(subject)

    def _word(self, word: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(word))
