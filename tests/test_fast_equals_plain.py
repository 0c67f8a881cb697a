"""The fast forms give what the plain ones in `bench/` give: same losses, same targets, same solves."""

from __future__ import annotations

import pytest
import torch

import tiny
from bench.plain import GPT2, LLAMA, Fact, Names, Options, Search, make_rows, search_value
from bench.plain_edit import mean_key, memit_solve, read, rome_u, rome_v
from bench.plain_moments import second_moment
from golden import relative_error
from manyedits.data import Request
from manyedits.hooks import capture
from manyedits.methods.base import Recorder, ValueParams
from manyedits.methods.keys import mean_keys
from manyedits.methods.solve import Factored, rank_one
from manyedits.methods.value import Values, find_values
from manyedits.model import EditableModel

CONTEXTS = ("{}", "She opened the window. {}", "It is a city with many parks and a river. {}")
NAMES = {"gpt2": GPT2, "llama": LLAMA}
WHERE = ("subject_last", "subject_first", "subject_first_after_last", "last")
CLOSE, EXACT = 1e-4, 1e-9

kinds = pytest.mark.parametrize("kind", sorted(NAMES))


def fact(request: Request) -> Fact:
    return Fact(request.prompt, request.subject, request.target)


def requests() -> list[Request]:
    """Subjects and targets of several lengths, late and early in their prompts."""
    made = tiny.requests(4)
    early = Request(id="early", subject="Hugo Lantern", prompt="{} grew up speaking", target="Old Greek")
    return [*made, early]


def plain(model: EditableModel, names: Names, layer: int, site: str, params: ValueParams) -> list[Search]:
    options = Options(
        where=params.fact_token,
        steps=params.steps,
        step_size=params.step_size,
        decay=params.weight_decay,
        clamp=params.clamp,
        kl_factor=params.kl_weight,
        enough=params.stop_below,
    )
    module = (names.block if site == "block" else names.mlp).format(layer)
    rows = [make_rows(model.tokenizer, fact(one), CONTEXTS, params.fact_token) for one in requests()]
    return [search_value(model.hf, module, each, options) for each in rows]


def fast(model: EditableModel, layer: int, site: str, params: ValueParams, recorder: Recorder | None = None) -> Values:
    path = model.block(layer) if site == "block" else model.mlp_out(layer)
    return find_values(model, requests(), layer, path, CONTEXTS, params, recorder)


def assert_equal(ours: Values, theirs: list[Search]) -> None:
    """Losses of every evaluation, where each search stopped, and targets."""
    for losses, target, search in zip(ours.losses, ours.target, theirs, strict=True):
        made = int((~losses[:, 0].isnan()).sum())
        assert made == len(search.losses)
        assert relative_error(losses[:made], search.losses) <= CLOSE
        assert relative_error(target, search.target) <= CLOSE


@kinds
@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("site", ["mlp", "block"])
def test_value_search(kind: str, where: str, site: str) -> None:
    model, params = tiny.model(kind), ValueParams(fact_token=where, steps=12, step_size=0.1)
    for layer in (0, 1):
        theirs = plain(model, NAMES[kind], layer, site, params)
        assert_equal(fast(model, layer, site, params), theirs)


@pytest.mark.parametrize("kind", tiny.ADDITIVE)
@pytest.mark.parametrize("site", ["mlp", "block"])
def test_value_search_on_every_row_of_the_table(kind: str, site: str) -> None:
    model, params = tiny.model(kind), ValueParams(steps=6, step_size=0.1)
    block, out = f"{model.arch.blocks}.{{}}", f"{model.arch.blocks}.{{}}.{model.arch.mlp_out}"
    theirs = plain(model, Names(block, out, out), 1, site, params)
    assert_equal(fast(model, 1, site, params), theirs)


@kinds
def test_value_search_at_the_last_layer(kind: str) -> None:
    model, params = tiny.model(kind), ValueParams(steps=6, step_size=0.1)
    last = model.layers - 1
    assert_equal(fast(model, last, "block", params), plain(model, NAMES[kind], last, "block", params))


@kinds
def test_requests_leave_when_their_own_loss_is_small_enough(kind: str) -> None:
    """Requests of one batch stop at different steps, each where it stops alone."""
    model = tiny.model(kind)
    free = plain(model, NAMES[kind], 1, "mlp", ValueParams(steps=25, step_size=0.1, stop_below=0.0))
    level = float(torch.stack([search.losses[12, 0] for search in free]).median())
    params = ValueParams(steps=25, step_size=0.1, stop_below=level)
    theirs = plain(model, NAMES[kind], 1, "mlp", params)
    assert len({len(search.losses) for search in theirs}) > 1
    assert_equal(fast(model, 1, "mlp", params), theirs)


@kinds
def test_projection(kind: str) -> None:
    model, params = tiny.model(kind), ValueParams(steps=10, step_size=0.5, clamp=0.25)
    ours, theirs = fast(model, 1, "block", params), plain(model, NAMES[kind], 1, "block", params)
    assert_equal(ours, theirs)
    acted = [bool((s.delta_steps.norm(dim=1) > 0.25 * s.start.norm()).any()) for s in theirs]
    assert all(acted)
    # The last step is projected too, so no delta is longer than the ball.
    assert bool((ours.delta.norm(dim=1) <= 0.25 * ours.initial.norm(dim=1) * (1 + 1e-5)).all())


@kinds
def test_first_gradient(kind: str) -> None:
    model, params, recorder = tiny.model(kind), ValueParams(steps=2), Recorder()
    fast(model, 1, "mlp", params, recorder)
    theirs = torch.stack([search.grad_step0 for search in plain(model, NAMES[kind], 1, "mlp", params)])
    assert relative_error(recorder.tensors["grad_step0"], theirs) <= CLOSE


@kinds
def test_keys(kind: str) -> None:
    """Keys from texts cut off at the lookup position, in a batch, against the whole text alone."""
    model, names = tiny.model(kind), NAMES[kind]
    groups = (CONTEXTS[:1], CONTEXTS[1:])
    for where in WHERE:
        keys, outputs = mean_keys(model, model.mlp_out(1), requests(), groups, where, model.block(2))
        site, block = names.mlp_out.format(1), names.block.format(2)
        words = model.tokenizer
        theirs = [mean_key(model.hf, words, site, fact(one), groups, where) for one in requests()]
        read_out = [read(model.hf, words, block, fact(one), "{}", where)[1] for one in requests()]
        assert relative_error(keys, torch.stack(theirs)) <= 1e-5
        assert relative_error(outputs, torch.stack(read_out)) <= 1e-5


@kinds
def test_second_moments(kind: str) -> None:
    model = tiny.model(kind)
    ids = torch.randint(3, 200, (4, 32), generator=torch.Generator().manual_seed(0))
    paths = [model.mlp_out(layer) for layer in range(model.layers)]
    inputs = capture(model.hf, {"input_ids": ids}, dict.fromkeys(paths, "in"))
    for path in paths:
        keys = inputs[path].flatten(0, 1).double()
        assert relative_error(second_moment(model.hf, path, [ids]), keys.T @ keys / len(keys)) <= 1e-5


def moment(width: int, condition: float) -> torch.Tensor:
    """A positive definite matrix of this condition number, in 64 bit."""
    generator = torch.Generator().manual_seed(width)
    basis, _ = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))
    spectrum = torch.logspace(0, -torch.log10(torch.tensor(condition)).item(), width, dtype=torch.float64)
    return basis @ torch.diag(spectrum) @ basis.T


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("count", [1, 8, 100])
def test_solves(condition: float, count: int) -> None:
    covariance, weight = moment(96, condition), 30.0
    keys = torch.randn(count, 96, dtype=torch.float64, generator=torch.Generator().manual_seed(count))
    ours = Factored(covariance).spread(keys.T, weight)
    assert relative_error(ours, memit_solve(keys, covariance, weight)) <= EXACT
    direction = Factored(covariance).solve(keys[0][:, None])[:, 0]
    assert relative_error(direction / direction.norm(), rome_u(keys[0], covariance)) <= EXACT


def test_rank_one() -> None:
    draw = torch.randn(4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    direction, key, target, output = draw
    assert relative_error(rank_one(direction, key, target, output), rome_v(target, output, key, direction)) <= EXACT


@kinds
def test_the_recorder_keeps_the_steps_of_requests_that_leave(kind: str) -> None:
    """A row per request, NaN from where it left: what a comparison with recordings reads."""
    model = tiny.model(kind)
    free = plain(model, NAMES[kind], 1, "mlp", ValueParams(steps=20, step_size=0.1, stop_below=0.0))
    level = float(torch.stack([search.losses[8, 0] for search in free]).median())
    params, recorder = ValueParams(steps=20, step_size=0.1, stop_below=level), Recorder()
    theirs = plain(model, NAMES[kind], 1, "mlp", params)
    assert len({len(search.delta_steps) for search in theirs}) > 1
    fast(model, 1, "mlp", params, recorder)
    for steps, search in zip(recorder.tensors["delta_steps"], theirs, strict=True):
        made = int((~steps[:, 0].isnan()).sum())
        assert relative_error(steps[:made], search.delta_steps) <= CLOSE
