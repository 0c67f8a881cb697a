"""Everything that can be found wrong with an experiment before any weight is loaded, all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from manyedits import complaints
from manyedits.arch import ARCHS
from manyedits.assembly import corpus_of, merged, requests_of, steps_of
from manyedits.benchmarks import benchmarks_named
from manyedits.config import Experiment, FormMistakes, Options, Sound, Study, load_study
from manyedits.errors import Mistakes, UserError, raise_all
from manyedits.loading import check_folder, local_folder, random_config, read_config
from manyedits.methods import METHODS
from manyedits.methods.base import EditMethod, Need, preset

T = TypeVar("T")


def check_options(options: Options) -> None:
    """Refuse a device that cannot compute here, and a folder that is not there."""
    errors: list[UserError] = []
    _try(errors, lambda: _check_device(options.device))
    if options.data_dir is not None and not options.data_dir.is_dir():
        errors.append(UserError(f"There is no folder {options.data_dir}.", "Correct `--data-dir`."))
    raise_all(errors)


def _check_device(name: str) -> None:
    """Compute something there: only that tells a device that is named from one that is here and works."""
    try:
        torch.ones(1, device=name).add(1).item()
    except (RuntimeError, AssertionError, NotImplementedError, ImportError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"The device `{name}` cannot be used: {reason.rstrip('.')}.", "Give `--device cpu`, `cuda` or `cuda:1`."
        ) from None


def read_study(path: Path) -> Study:
    """An experiment file, read. When its form is wrong, whatever else is wrong comes with that, so all at once."""
    try:
        return load_study(path)
    except FormMistakes as wrong:
        found = {str(error): error for error in (*wrong.errors, *_mistakes(wrong.rest))}
        raise Mistakes(list(found.values())) from None


def check_study(study: Study) -> None:
    """Raise ``Mistakes`` with all that is wrong, each thing once however many cells share it."""
    raise_all(_mistakes([(cell, frozenset()) for cell in study.cells]))


def _mistakes(cells: Sequence[Sound]) -> list[UserError]:
    """What is wrong with cells, each with the keys of it whose form is wrong: what hangs on those is not looked at."""
    found: dict[str, UserError] = {}
    lengths: dict[str, int] = {}
    for cell, broken in cells:
        for error in _cell(cell, broken, lengths):
            found.setdefault(str(error), error)
    measured = not any(broken & {"checkpoints", "batch"} for _, broken in cells)
    if cells and measured and all(cell.digest() in lengths for cell, _ in cells):
        for error in _checkpoints([cell for cell, _ in cells], lengths):
            found.setdefault(str(error), error)
    return list(found.values())


def _cell(cell: Experiment, broken: frozenset[str], lengths: dict[str, int]) -> list[UserError]:
    errors: list[UserError] = []
    config = None if "model" in broken else _try(errors, lambda: _config(cell))
    method = None if "method" in broken else _method(cell, errors)
    requests = None if broken & {"data", "conflicts"} else _try(errors, lambda: requests_of(cell))
    _try(errors, lambda: corpus_of(cell))
    for name in cell.benchmarks:
        _try(errors, lambda name=name: benchmarks_named(name))  # type: ignore[misc]
    if requests is not None:
        lengths[cell.digest()] = len(requests)
    if method is not None:
        errors += _suits(cell, method, config or {}, "statistics" in broken)
    return errors


def _try(errors: list[UserError], do: Callable[[], T]) -> T | None:
    try:
        return do()
    except Mistakes as several:
        errors += several.errors
    except UserError as error:
        errors.append(error)
    return None


def _config(cell: Experiment) -> dict[str, Any]:
    """The model's config, without loading weights; empty when the model must come from the hub."""
    if isinstance(cell.model, dict):
        config = random_config(cell.model)
        return {**config.to_dict(), "num_hidden_layers": getattr(config, "num_hidden_layers", None)}
    try:
        folder = local_folder(cell.model)
    except OSError as error:
        raise UserError(
            f"`{cell.model[:60]}...` names no model: {error.strerror}.", "Give a folder or owner/name@revision."
        ) from None
    if folder is None:
        return {}
    check_folder(folder)
    return read_config(folder)


def _method(cell: Experiment, errors: list[UserError]) -> EditMethod | None:
    """The method with its parameters, or None with what is wrong added to ``errors``."""
    cls = _try(errors, lambda: METHODS.load(cell.method.name))
    if cls is None:
        return None
    chosen: dict[str, Any] | None = {"params": {}}
    if cell.method.preset is not None:
        chosen = _try(errors, lambda: preset(cell.method.name, str(cell.method.preset)))
    if chosen is None:
        return None
    params, wrong = complaints.of_params(cls.Params, merged(chosen["params"], cell.method.overrides), cell.method.name)
    errors += wrong
    return cls(params) if params is not None else None  # type: ignore[no-any-return]


def _suits(cell: Experiment, method: EditMethod, config: dict[str, Any], no_text: bool) -> Iterator[UserError]:
    """What a method cannot do with this model, this batch or these statistics (unless ``no_text`` says they are wrong)."""
    name, kind = cell.method.name, config.get("model_type")
    if method.batch is not None and cell.batch > method.batch:
        yield UserError(
            f"`{name}` takes {method.batch} request at a time, `batch` is {cell.batch}.",
            f"Set `batch: {method.batch}`.",
        )
    if Need.STATISTICS in method.requires() and cell.statistics is None and not no_text:
        yield UserError(f"`{name}` needs a text to gather second moments over.", "Set `statistics: {corpus: FILE}`.")
    if kind in ARCHS and ARCHS[kind].norm_after_mlp and Need.ADDITIVE_MLP in method.needs:
        yield UserError(
            f"`{name}` cannot edit {kind}: there a norm stands between the MLP's output and the residual stream.",
            "Choose a method without that assumption (`manyedits list methods`), or another model.",
        )
    if cell.method.preset is not None and kind is not None:
        wanted = preset(name, cell.method.preset)["architecture"]
        if wanted not in ("any", kind):
            yield UserError(
                f"The preset `{cell.method.preset}` is for {wanted}, the model is {kind}.", "Choose another preset."
            )
    yield from _layers(method, config, name)


def _layers(method: EditMethod, config: dict[str, Any], name: str) -> Iterator[UserError]:
    depth = config.get("num_hidden_layers") or config.get("n_layer")
    chosen = getattr(method.params, "layers", None) or [getattr(method.params, "layer", 0)]
    for layer in chosen:
        if type(depth) is int and isinstance(layer, int) and layer >= depth:
            yield UserError(
                f"`{name}` is to edit layer {layer}, the model has {depth} layers, 0 to {depth - 1}.",
                "Correct `layer` or `layers`, or choose a preset of this model (`manyedits list presets`).",
            )


def _checkpoints(cells: Sequence[Experiment], lengths: dict[str, int]) -> Iterator[UserError]:
    measured = {step for cell in cells for step in steps_of(cell, lengths[cell.digest()])}
    for step in sorted({s for cell in cells for s in cell.checkpoints} - measured):
        most = max(lengths.values())
        why = f"the data gives {most} requests" if step > most else "it is a multiple of no cell's batch"
        yield UserError(f"Checkpoint {step} cannot be measured by any cell: {why}.", "Remove or change it.")
