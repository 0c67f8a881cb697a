"""What an experiment will run and take, from its files' headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from manyedits.assembly import benchmarks_of, method_of, requests_of, steps_of
from manyedits.checks import check_study
from manyedits.config import Experiment, Options, Study
from manyedits.loading import local_folder, random_config, read_config

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def plan_study(study: Study, options: Options) -> dict[str, Any]:
    """Every cell with its steps, memory and disk, in bytes. Raises ``Mistakes`` with all that is wrong."""
    check_study(study)
    cells = [_cell(folder, cell) for folder, cell in study.folders(options).items()]
    return {"out": str(study.out(options)), "cells": cells, "disk": sum(c["disk"] or 0 for c in cells)}


def _cell(folder: Path, cell: Experiment) -> dict[str, Any]:
    requests = len(requests_of(cell))
    steps = steps_of(cell, requests)
    skipped = sorted(set(cell.checkpoints) - set(steps))
    shape = _shape(cell)
    layers = _layers(cell)
    known = None if shape is None else _bytes(cell, shape, layers, steps)
    return {
        "folder": str(folder),
        "model": cell.model,
        "method": cell.method.name,
        "requests": requests,
        "edits": -(-steps[-1] // cell.batch),
        "checkpoints": steps,
        "not_measured": skipped,
        "benchmarks": [benchmark.name for benchmark in benchmarks_of(cell)],
        "memory": known and known["memory"],
        "disk": known and known["disk"],
    }


def _layers(cell: Experiment) -> int:
    params = method_of(cell).params
    return len(getattr(params, "layers", None) or [0])


def _shape(cell: Experiment) -> Mapping[str, int] | None:
    """Parameters and the size of an edited weight; None when they cannot be told from what is here."""
    if isinstance(cell.model, dict):
        config = random_config(cell.model).to_dict()
        parameters = None
    else:
        folder = local_folder(cell.model)
        if folder is None:
            return None
        config = read_config(folder)
        parameters = _parameters(folder)
    hidden, depth = _number(config, "hidden_size", "n_embd", "d_model"), _number(config, "num_hidden_layers", "n_layer")
    if hidden is None or depth is None:
        return None
    inner = _number(config, "intermediate_size", "ffn_dim", "n_inner") or 4 * hidden
    return {"parameters": parameters or 12 * depth * hidden**2, "hidden": hidden, "inner": inner}


def _number(config: Mapping[str, Any], *names: str) -> int | None:
    """The first of these keys that holds a count."""
    return next((config[name] for name in names if type(config.get(name)) is int), None)


def _parameters(folder: Path) -> int:
    from math import prod

    from safetensors import safe_open

    total = 0
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="np") as tensors:
            total += sum(prod(tensors.get_slice(n).get_shape()) for n in tensors.keys())  # noqa: SIM118
    return total


def _bytes(cell: Experiment, shape: Mapping[str, int], layers: int, steps: list[int]) -> dict[str, int]:
    """Model; per edited layer a master, a base copy and a factored second moment; a change per request; snapshots."""
    weight, moment = shape["hidden"] * shape["inner"], shape["inner"] ** 2
    model = shape["parameters"] * BYTES[cell.dtype]
    held = layers * (weight * (4 + BYTES[cell.dtype]) + moment * 8)
    changes = steps[-1] * layers * 4 * (shape["hidden"] + shape["inner"])
    return {"memory": model + held, "disk": changes + 4 * weight * layers * len([s for s in steps if s])}


def as_text(plan: Mapping[str, Any]) -> str:
    """A plan for people."""
    lines = [f"{len(plan['cells'])} run(s) into {plan['out']}"]
    for cell in plan["cells"]:
        lines.append(f"\n{cell['method']} on {cell['model']}")
        lines.append(
            f"  {cell['requests']} requests in {cell['edits']} edits; measured at {_list(cell['checkpoints'])}"
        )
        if cell["not_measured"]:
            lines.append(f"  not measured, no multiple of the batch or past the data: {_list(cell['not_measured'])}")
        lines.append(f"  benchmarks: {_list(cell['benchmarks'])}")
        lines.append(f"  memory about {_size(cell['memory'])}, disk about {_size(cell['disk'])} in {cell['folder']}")
    return "\n".join(lines)


def _list(values: list[Any]) -> str:
    return ", ".join(str(v) for v in values)


def _size(count: int | None) -> str:
    if count is None:
        return "unknown until the model is loaded"
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count = count / 1000  # type: ignore[assignment]
    return ""
