"""Everything that can be found wrong with an experiment before any weight is loaded, all at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from manyedits.arch import ARCHS
from manyedits.assembly import corpus_of, merged, requests_of, steps_of
from manyedits.benchmarks import benchmarks_named
from manyedits.config import Experiment, Study, validate_params
from manyedits.errors import Mistakes, UserError
from manyedits.loading import check_folder, local_folder, random_config, read_config
from manyedits.methods import METHODS
from manyedits.methods.base import EditMethod, Need, preset

T = TypeVar("T")


def check_study(study: Study) -> None:
    """Raise ``Mistakes`` with all that is wrong, each thing once however many cells share it."""
    found: dict[str, UserError] = {}
    lengths: dict[str, int] = {}
    for cell in study.cells:
        for error in _cell(cell, lengths):
            found.setdefault(str(error), error)
    if all(cell.digest() in lengths for cell in study.cells):
        for error in _checkpoints(study, lengths):
            found.setdefault(str(error), error)
    if found:
        raise Mistakes(list(found.values()))


def _cell(cell: Experiment, lengths: dict[str, int]) -> Iterator[UserError]:
    errors: list[UserError] = []
    config = _try(errors, lambda: _config(cell))
    method = _method(cell, errors)
    requests = _try(errors, lambda: requests_of(cell))
    _try(errors, lambda: corpus_of(cell))
    for name in cell.benchmarks:
        _try(errors, lambda name=name: benchmarks_named(name))  # type: ignore[misc]
    if requests is not None:
        lengths[cell.digest()] = len(requests)
    if method is not None:
        errors += _suits(cell, method, config or {})
    yield from errors


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
    folder = local_folder(cell.model)
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
    params, wrong = validate_params(cls.Params, merged(chosen["params"], cell.method.overrides), cell.method.name)
    errors += wrong
    return cls(params) if params is not None else None  # type: ignore[no-any-return]


def _suits(cell: Experiment, method: EditMethod, config: dict[str, Any]) -> Iterator[UserError]:
    """What a method cannot do with this model, this batch or these statistics."""
    name, kind = cell.method.name, config.get("model_type")
    if method.batch is not None and cell.batch > method.batch:
        yield UserError(
            f"`{name}` takes {method.batch} request at a time, `batch` is {cell.batch}.",
            f"Set `batch: {method.batch}`.",
        )
    if Need.STATISTICS in method.requires() and cell.statistics is None:
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


def _checkpoints(study: Study, lengths: dict[str, int]) -> Iterator[UserError]:
    measured = {step for cell in study.cells for step in steps_of(cell, lengths[cell.digest()])}
    for step in sorted({s for cell in study.cells for s in cell.checkpoints} - measured):
        most = max(lengths.values())
        why = f"the data gives {most} requests" if step > most else "it is a multiple of no cell's batch"
        yield UserError(f"Checkpoint {step} cannot be measured by any cell: {why}.", "Remove or change it.")


def places(study: Study) -> list[Path]:
    """Files that the study reads, for `plan`."""
    named = {Path(p) for cell in study.cells for p in (cell.data.path, cell.statistics and cell.statistics.corpus) if p}
    return sorted(named)
