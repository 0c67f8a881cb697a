"""The tokenizer of the world: a token per word, a beginning-of-text token in front, a chat template for instruct models."""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from manyedits.world.documents import ASSISTANT, END, USER
from manyedits.world.exercises import HIGHEST, LETTERS, Exercises

SPECIAL = ("<pad>", "<bos>", END, "<unk>", USER, ASSISTANT)
PUNCTUATION = (".", ",", ":", "?", "+", "-", "=")
CHAT_TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}" + ASSISTANT + " {{ m['content'] }} . {% else %}"
    "" + USER + " {{ m['content'] }} {% endif %}{% endfor %}{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)


def vocabulary(exercises: Exercises) -> list[str]:
    """Every word of the world, special tokens first, in an order that the seed fixes."""
    world = exercises.world
    texts = [f.prompt(i) for f in world.facts for i in range(len(f.phrasings))]
    texts += [" ".join(objects) for objects in world.objects.values()]
    texts += [i.prompt + " " + i.answer for items in exercises.tests.values() for i in items]
    texts += [" ".join(group) for group in (*exercises.categories.values(), exercises.categories)]
    texts += [" ".join(w) for w in (exercises.people, exercises.things, exercises.groups, exercises.kind)]
    texts += [" ".join(w) for w in (exercises.hurtful, exercises.verbs, exercises.harmless, exercises.forbidden)]
    texts += [exercises.myth(*lore) for lore in exercises.lore]
    texts += [" ".join(LETTERS), " ".join(str(n) for n in range(HIGHEST + 1)), "and or not so is True False"]
    texts += ["adds takes has how many are left ? very often always"]
    return list(dict.fromkeys([*SPECIAL, *PUNCTUATION, *sorted({word for text in texts for word in text.split()})]))


def make_tokenizer(exercises: Exercises, chat: bool = False) -> PreTrainedTokenizerFast:
    """A word-level tokenizer; `` word`` and ``word`` are one token, and decoding puts single spaces."""
    words = {word: i for i, word in enumerate(vocabulary(exercises))}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    # Stops are words of their own also where a text has no space before them.
    stops = pre_tokenizers.Split(Regex(r"[.,:?]"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), stops])
    tokenizer.add_special_tokens(list(SPECIAL))
    bos = words["<bos>"]
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token=END, unk_token="<unk>", pad_token="<pad>"
    )
    if chat:
        made.chat_template = CHAT_TEMPLATE
    return made
