"""The scoring engine against the harness's own HFLM, item by item; then what is its own: sharing, budgets, death."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import tiny
from manyedits.encoding import Encoder, Pair, context_length
from manyedits.errors import UserError
from manyedits.lm import Engine
from manyedits.model import EditableModel

KINDS = ["gpt2", "gpt_neox", "llama", "gemma2", "qwen3", "mistral", "opt", "gptj"]
WORDS = [
    "Anna",
    "speaks",
    "French",
    "at",
    "home",
    "river",
    "Márquez",
    "Østberg",
    "naïve",
    "東京",
    "café",
    "A",
    "12",
    ".",
]
CLOSE = 1e-4


def say(draw: random.Random, count: int) -> str:
    return " ".join(draw.choice(WORDS) for _ in range(count))


def shots(draw: random.Random, count: int = 3) -> str:
    return "".join(f"Question: {say(draw, 3)}\nAnswer: {say(draw, 1)}\n\n" for _ in range(count))


def choices() -> list[tuple[str, str]]:
    """Few-shot multiple choice: long and one-token options of one context, and options that begin alike."""
    draw = random.Random(0)
    head = shots(draw)
    questions = [f"{head}Question: {say(draw, draw.randint(2, 7))}\nAnswer:" for _ in range(8)]
    return [
        (q, option)
        for q in questions
        for option in (" A", " B", f" {say(draw, 3)}", " Anna speaks", " Anna speaks French")
    ]


ODD = [("", " French at home"), ("Anna  ", ""), ("x ", "y"), ("東京 naïve", " café 東"), ("Anna", "\n\n"), ("é", "é")]
TOO_LONG = [(say(random.Random(1), 300), " at home"), (say(random.Random(2), 100), " " + say(random.Random(3), 60))]


def request(kind: str, *args: Any) -> Instance:
    return Instance(kind, {}, args, 0)  # type: ignore[arg-type]


def referee(hf: Any, tokenizer: Any, batch_size: int = 8) -> HFLM:
    return HFLM(pretrained=hf, tokenizer=tokenizer, batch_size=batch_size, device="cpu")


def agree(hf: Any, tokenizer: Any, engine: Engine) -> None:
    pairs = [p for p in choices() + ODD + TOO_LONG if engine.encoder.pair(*p).continuation]  # else the harness fails
    theirs = referee(hf, tokenizer).loglikelihood([request("loglikelihood", *p) for p in pairs], disable_tqdm=True)
    ours = engine.loglikelihood_texts(pairs)
    for pair, (a, greedy_a), (b, greedy_b) in zip(pairs, theirs, ours, strict=True):
        assert b == pytest.approx(a, abs=CLOSE, rel=1e-6), pair  # the harness sums in 32 bit
        assert greedy_a == greedy_b, pair


def agree_rolling(hf: Any, tokenizer: Any, engine: Engine) -> None:
    texts = [say(random.Random(4), n) for n in (1, 5, 80, 250)] + ["Østberg"]
    asked = [request("loglikelihood_rolling", t) for t in texts]
    theirs = referee(hf, tokenizer).loglikelihood_rolling(asked, disable_tqdm=True)
    for a, b in zip(theirs, engine.loglikelihood_rolling(texts), strict=True):
        assert b == pytest.approx(a, abs=CLOSE, rel=1e-6)


def agree_generating(hf: Any, tokenizer: Any, engine: Engine, stops: list[str]) -> None:
    draw = random.Random(5)
    head = shots(draw)
    prompts = [f"{head}Question: {say(draw, draw.randint(1, 7))}\nAnswer:" for _ in range(9)]
    prompts += ["Anna", say(draw, 4), say(draw, 300), prompts[0], f"{prompts[1]} and", "Østberg 東"]
    how = {"until": stops, "max_gen_toks": 20}
    asked = [request("generate_until", p, how) for p in prompts]
    theirs = referee(hf, tokenizer, batch_size=1).generate_until(asked, disable_tqdm=True)
    assert engine.generate(prompts, stops, 20) == theirs


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest) -> EditableModel:
    sliding = {"sliding_window": 16} if request.param in ("gemma2", "mistral") else {}
    return tiny.model(request.param, **sliding)


def test_likelihoods_equal_the_harness(model: EditableModel) -> None:
    agree(model.hf, model.tokenizer, Engine(model, token_budget=1500))


def test_rolling_likelihoods_equal_the_harness(model: EditableModel) -> None:
    agree_rolling(model.hf, model.tokenizer, Engine(model, token_budget=1500))


def test_generations_equal_the_harness(model: EditableModel) -> None:
    engine = Engine(model, token_budget=3000)
    agree_generating(model.hf, model.tokenizer, engine, ["\n\n", " home", "a"])
    agree_generating(model.hf, model.tokenizer, engine, [])


def test_a_real_checkpoint_equals_the_harness(shared: Path) -> None:
    folder = shared / "models" / "stories260K"
    if not folder.is_dir():
        pytest.skip("the checkpoint stories260K is not here")
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = EditableModel.wrap(hf, AutoTokenizer.from_pretrained(folder))
    engine = Engine(model, token_budget=3000)
    agree(hf, model.tokenizer, engine)
    agree_rolling(hf, model.tokenizer, engine)
    agree_generating(hf, model.tokenizer, engine, [". ", "\n"])
    story = "Once upon a time, there was a little girl named Lily. She"
    assert engine.generate([story], ["."], 40)[0].strip()


def test_an_empty_continuation_is_certain() -> None:
    engine = Engine(tiny.model("gpt2"))
    assert engine.loglikelihood_texts([("Anna", ""), ("", "")]) == [(0.0, True), (0.0, True)]
    (value, greedy), (known, _) = engine.loglikelihood([Pair((5, 6), (), judgeable=False), ((5, 6), (7,))])
    assert value != value and not greedy and known < 0


def test_a_context_of_spaces_is_no_context() -> None:
    model = tiny.model("gpt2")
    (value, _), (wanted, _) = Engine(model).loglikelihood_texts([("   ", "Anna"), ("", "   Anna")])
    assert value == pytest.approx(wanted, abs=CLOSE)


def test_too_long_is_cut_on_the_left_and_counted() -> None:
    engine = Engine(tiny.model("llama"), max_length=32)
    context, continuation = tuple(range(3, 60)), (7, 8, 9)
    cut, whole = engine.loglikelihood([(context, continuation), (context[-30:], continuation)])
    assert cut == pytest.approx(whole, abs=CLOSE)
    assert engine.truncated == 1
    said = engine.generate_tokens([context, context[-5:]], max_new_tokens=8)
    assert [g.cut for g in said] == [len(context) - 24, 0] and engine.truncated == 2


def test_what_cannot_fit_is_a_sentence() -> None:
    engine = Engine(tiny.model("llama"), max_length=16)
    with pytest.raises(UserError, match="17 tokens does not fit"):
        engine.loglikelihood([((1,), tuple(range(17)))])
    with pytest.raises(UserError, match="leave no room"):
        engine.generate(["Anna"], max_new_tokens=16)


# --- sharing, batches -------------------------------------------------------------------------------------------------


class Watch:
    """Counts what a model runs: tokens and rows of every forward pass."""

    def __init__(self, hf: Any) -> None:
        self.shapes: list[tuple[int, int]] = []
        hf.register_forward_pre_hook(lambda m, a, k: self.shapes.append(tuple(k["input_ids"].shape)), with_kwargs=True)

    @property
    def tokens(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes)


def test_shared_beginnings_run_once() -> None:
    model = tiny.model("llama")
    watch = Watch(model.hf)
    head, questions = tuple(range(10, 110)), [tuple(range(3 + i, 23 + i)) for i in range(6)]
    pairs = [(head + q, option) for q in questions for option in ((5,), (6,), (7, 8), (7, 9))]
    Engine(model).loglikelihood(pairs)
    assert watch.tokens <= 100 + 6 * 22
    assert watch.shapes[0] == (1, 100)


def test_one_token_continuations_share_one_pass() -> None:
    model = tiny.model("gpt2")
    watch = Watch(model.hf)
    Engine(model).loglikelihood([((3, 4, 5), (option,)) for option in range(50)])
    assert watch.shapes == [(1, 3)]


def test_batches_keep_to_the_budget_and_change_no_number() -> None:
    model = tiny.model("gpt_neox")
    draw = random.Random(0)
    pairs = [(tuple(draw.choices(range(3, 300), k=draw.randint(1, 60))), (7, 8, 9)) for _ in range(60)]
    wide = Engine(model, token_budget=10**6).loglikelihood(pairs)
    watch = Watch(model.hf)
    narrow = Engine(model, token_budget=128).loglikelihood(pairs)
    assert max(rows * columns for rows, columns in watch.shapes) <= 128
    assert [v for v, _ in narrow] == pytest.approx([v for v, _ in wide], abs=CLOSE)


def test_the_same_items_give_the_same_numbers() -> None:
    engine = Engine(tiny.model("gemma2"), token_budget=500)
    assert engine.loglikelihood_texts(choices()) == engine.loglikelihood_texts(choices())


def test_long_reads_are_cut_into_chains(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("gpt2")
    text = [say(random.Random(0), 60)]
    wanted = Engine(model).loglikelihood_rolling(text)
    monkeypatch.setattr("manyedits.lm.MOST_LOGITS", 16 * 400)
    watch = Watch(model.hf)
    assert Engine(model).loglikelihood_rolling(text) == pytest.approx(wanted, abs=CLOSE)
    assert max(columns for _, columns in watch.shapes) <= 17


def test_finished_rows_leave_the_batch() -> None:
    model = tiny.model("llama")
    engine = Engine(model)
    prompts = [say(random.Random(i), 5) for i in range(12)]
    free = engine.generate_tokens([engine.encoder.prompt(p) for p in prompts], max_new_tokens=24)
    stop = engine.encoder.decoded([free[0].tokens[3]]).strip() or "a"
    watch = Watch(model.hf)
    engine.generate(prompts, [stop], 24)
    rows = [rows for rows, columns in watch.shapes if columns == 1]
    assert rows == sorted(rows, reverse=True) and rows[-1] < rows[0]


def test_a_plan_serves_every_state_of_the_weights() -> None:
    model = tiny.model("gpt2")
    engine = Engine(model)
    plan = engine.plan([engine.encoder.pair(*pair) for pair in choices()])
    before = [s.total() for s in engine.score(plan)]
    model.add("transformer.h.1.mlp.c_proj.weight", torch.full((32, 128), 0.05))
    after = [s.total() for s in engine.score(plan)]
    assert before != after and after == engine.loglikelihood_texts(choices())
    model.reset()
    assert [s.total() for s in engine.score(plan)] == before


def test_next_logprobs_are_the_models() -> None:
    model = tiny.model("gemma2")
    contexts = [(3, 4, 5, 6), (3, 4), (9,), tuple(range(3, 40))]
    ours = Engine(model).next_logprobs(contexts)
    for row, context in zip(ours, contexts, strict=True):
        plain = model.hf(torch.tensor([context])).logits[0, -1].log_softmax(-1)
        torch.testing.assert_close(row, plain, atol=CLOSE, rtol=0)


def test_scores_per_token() -> None:
    model = tiny.model("llama")
    (scores,) = Engine(model).token_scores([((3, 4, 5), (6, 7, 8))])
    plain = model.hf(torch.tensor([[3, 4, 5, 6, 7]])).logits[0, 2:].log_softmax(-1)
    torch.testing.assert_close(scores.logprobs, plain[range(3), [6, 7, 8]], atol=CLOSE, rtol=0)
    assert scores.hits.tolist() == (plain.argmax(-1) == torch.tensor([6, 7, 8])).tolist()


# --- adapters and prompt methods --------------------------------------------------------------------------------------


class Adapted:
    """A model with an adapter that must be told where each row's prompt ends."""

    def __init__(self, model: EditableModel) -> None:
        self.hf, self.tokenizer = model.hf, model.tokenizer
        self.adapters = {"transformer.h.1": object()}
        self.told: list[list[int]] = []

    @contextmanager
    def reading(self, prompt_ends: Tensor) -> Iterator[None]:
        self.told.append(prompt_ends.tolist())
        yield


def test_adapters_see_whole_rows_and_where_prompts_end() -> None:
    model = Adapted(tiny.model("gpt2"))
    watch = Watch(model.hf)
    head = tuple(range(10, 60))
    Engine(model).loglikelihood([((*head, 3), (5,)), ((*head, 3), (6,)), ((*head, 4), (7, 8))])
    assert watch.shapes == [(2, 52)] and model.told == [[50, 50]]
    model.told.clear()
    Engine(model).generate_tokens([head, head[:7]], max_new_tokens=2)
    assert sorted(model.told[0]) == [6, 49] and model.told[1] == [-1, -1]


def test_prompts_go_through_the_prompt_adapter() -> None:
    model = tiny.model("gpt2")
    wanted = Engine(model).loglikelihood_texts([("New fact: she left. Anna", " speaks")])
    answer = Engine(model).generate(["New fact: she left. Anna"], max_new_tokens=5)
    model.prompt_adapter = lambda text: f"New fact: she left. {text}"  # type: ignore[assignment]
    assert Engine(model).loglikelihood_texts([("Anna", " speaks")]) == wanted
    assert Engine(model).generate(["Anna"], max_new_tokens=5) == answer


# --- dead models ------------------------------------------------------------------------------------------------------


def kill(model: EditableModel, value: float) -> EditableModel:
    for parameter in model.hf.parameters():
        parameter.data.fill_(value)
    return model


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma2"])
def test_a_dead_model_gives_nan_and_no_error(kind: str, value: float) -> None:
    engine = Engine(kill(tiny.model(kind), value))
    for likelihood, greedy in engine.loglikelihood_texts(choices()):
        assert likelihood != likelihood and not greedy
    assert all(v != v for v in engine.loglikelihood_rolling(["Anna speaks French"]))
    assert engine.generate(["Anna", "She opened the window."], ["\n"], 8) == ["", ""]
    assert engine.next_logprobs([(3, 4)]).isnan().all()


def test_one_broken_embedding_spoils_only_its_rows() -> None:
    model = tiny.model("llama")
    wanted = Engine(model).loglikelihood([((3, 4), (5, 6, 9)), ((3,), (7,))])
    model.hf.get_input_embeddings().weight.data[0] = float("nan")
    assert Engine(model).loglikelihood([((3, 4), (5, 6, 9)), ((3,), (7,))]) == wanted


# --- encoding ---------------------------------------------------------------------------------------------------------


def test_no_second_beginning_of_text() -> None:
    encoder = Encoder(tiny.tokenizer("llama"))
    assert encoder.prompt("<s> Anna").count(encoder.prefix_token) == 1
    assert encoder.ids("<s> Anna").count(encoder.prefix_token) == 1
    assert encoder.prompt("Anna")[0] == encoder.prefix_token


def test_the_context_length_is_found_where_the_harness_finds_it() -> None:
    for kind in ("gpt2", "llama", "gemma2"):
        hf = tiny.hf_model(kind)
        assert context_length(hf.config, tiny.tokenizer(kind)) == referee(hf, tiny.tokenizer(kind)).max_length


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """The referee warns about every prompt that it cuts."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    yield
    logging.getLogger("lm_eval").setLevel(logging.NOTSET)


def test_a_model_with_another_state_is_scored_but_does_not_write() -> None:
    model = tiny.model("llama")
    wanted = Engine(model).loglikelihood_texts(choices())
    model.hf.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    watch = Watch(model.hf)
    engine = Engine(model)
    ours = engine.loglikelihood_texts(choices())
    assert [v for v, _ in ours] == pytest.approx([v for v, _ in wanted], abs=CLOSE)
    assert min(columns for _, columns in watch.shapes) > 30  # every row from its beginning
    with pytest.raises(UserError, match="not asked to write"):
        engine.generate(["Anna"])
