"""Where an architecture keeps the parts that editing needs.

A row is a handful of paths, declared and then checked on the real model: every path must resolve, the number of blocks
must be the config's, and the projection out of the MLP must end at the hidden size. Orientation is read from the
module's type, never guessed from shapes. A decoder without a row is discovered by structure where that is unambiguous.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manyedits.errors import UserError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Arch:
    """Where an architecture keeps the parts that editing needs; paths are below one block unless said."""

    blocks: str  # the list of blocks, from the root: "model.layers"
    mlp_in: str  # the projection into the MLP's inner space (the one that is not a gate)
    mlp_out: str  # the projection from the inner space back to the hidden size; its input is an edit's key
    attn_out: str  # the projection out of attention
    final_norm: str  # from the root: "model.norm"
    norm_after_mlp: bool = False  # the MLP's output is normalised before it joins the residual stream


_LLAMA = Arch("model.layers", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj", "model.norm")
_PHI3 = Arch("model.layers", "mlp.gate_up_proj", "mlp.down_proj", "self_attn.o_proj", "model.norm")
_POST_NORM = Arch("model.layers", "mlp.up_proj", "mlp.down_proj", "self_attn.o_proj", "model.norm", norm_after_mlp=True)

#: Rows by ``config.model_type``.
ARCHS: dict[str, Arch] = {
    "gpt2": Arch("transformer.h", "mlp.c_fc", "mlp.c_proj", "attn.c_proj", "transformer.ln_f"),
    "gptj": Arch("transformer.h", "mlp.fc_in", "mlp.fc_out", "attn.out_proj", "transformer.ln_f"),
    "gpt_neo": Arch("transformer.h", "mlp.c_fc", "mlp.c_proj", "attn.attention.out_proj", "transformer.ln_f"),
    "gpt_neox": Arch(
        "gpt_neox.layers", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h", "attention.dense", "gpt_neox.final_layer_norm"
    ),
    "opt": Arch("model.decoder.layers", "fc1", "fc2", "self_attn.out_proj", "model.decoder.final_layer_norm"),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "phi3": _PHI3,
    "gemma2": _POST_NORM,
    "gemma3_text": _POST_NORM,
    "olmo2": _POST_NORM,
}


def arch_of(hf: PreTrainedModel) -> Arch:
    """The row of this model, checked on it; discovered by structure when its type has no row.

    Raises ``UserError`` naming the path that does not resolve, or what made a discovery ambiguous.
    """
    row = ARCHS.get(hf.config.model_type)
    if row is None:
        row = discover(hf)
    check(hf, row)
    return row


def check(hf: PreTrainedModel, arch: Arch) -> None:
    """Resolve every path of a row on the real model and compare what the config states."""
    blocks = _resolve(hf, arch.blocks, hf.config.model_type)
    depth = hf.config.num_hidden_layers
    if len(blocks) != depth:  # type: ignore[arg-type]
        raise UserError(
            f"{hf.config.model_type}: `{arch.blocks}` holds {len(blocks)} blocks, the config says {depth}.",  # type: ignore[arg-type]
            "Correct the architecture's row in arch.py.",
        )
    for path in (arch.mlp_in, arch.mlp_out, arch.attn_out):
        if path:
            _resolve(blocks[0], path, hf.config.model_type)  # type: ignore[index]
    if arch.final_norm:
        _resolve(hf, arch.final_norm, hf.config.model_type)
    width = out_features(blocks[0].get_submodule(arch.mlp_out))  # type: ignore[index]
    if width != hf.config.hidden_size:
        raise UserError(
            f"{hf.config.model_type}: `{arch.mlp_out}` ends at {width} features, the hidden size is "
            f"{hf.config.hidden_size}.",
            "Correct the architecture's row in arch.py.",
        )


def _resolve(root: nn.Module, path: str, model_type: str) -> nn.Module:
    try:
        return root.get_submodule(path)
    except AttributeError:
        raise UserError(
            f"The row of architecture `{model_type}` names `{path}`, which this model does not have.",
            "The model may be of another architecture than its config says; see arch.py.",
        ) from None


def is_transposed(module: nn.Module) -> bool:
    """Whether a module keeps its weight as (in, out): GPT-2's Conv1D does, everything else is (out, in)."""
    from transformers import Conv1D

    return isinstance(module, Conv1D)


def out_features(module: nn.Module) -> int:
    """How many features a linear module gives."""
    shape = module.get_parameter("weight").shape
    return int(shape[1] if is_transposed(module) else shape[0])


def in_features(module: nn.Module) -> int:
    """How many features a linear module takes."""
    shape = module.get_parameter("weight").shape
    return int(shape[0] if is_transposed(module) else shape[1])


def discover(hf: PreTrainedModel) -> Arch:
    """Find the row of an unknown decoder by structure, or say what was ambiguous.

    The blocks are the one module list as long as ``num_hidden_layers``; the MLP's way out is the one linear module of
    a block that ends at the hidden size and starts from another. Whether a norm follows the MLP is not visible in the
    structure, so it is measured (``_adds_to_stream``).
    """
    blocks = _the_one_list(hf)
    block = hf.get_submodule(blocks)[0]  # type: ignore[index]
    linear = {n: m for n, m in block.named_modules() if _is_linear(m)}
    hidden = hf.config.hidden_size
    back = [n for n, m in linear.items() if out_features(m) == hidden and in_features(m) != hidden]
    if len(back) != 1:
        raise UserError(
            f"Unknown architecture `{hf.config.model_type}`: {len(back)} projections of a block lead back to the hidden "
            f"size ({', '.join(back) or 'none'}); exactly one must.",
            "Add a row for this architecture to arch.py.",
        )
    inner = in_features(linear[back[0]])
    into = [n for n, m in linear.items() if in_features(m) == hidden and out_features(m) in (inner, 2 * inner)]
    row = Arch(blocks, _last_ungated(into), back[0], _attention_out(linear, hidden, back[0]), _final_norm(hf, blocks))
    row = Arch(*_fields(row), norm_after_mlp=not _adds_to_stream(hf, row))
    logger.warning("No row for architecture `%s`; found by structure: %s", hf.config.model_type, row)
    return row


def _fields(row: Arch) -> tuple[str, str, str, str, str]:
    return row.blocks, row.mlp_in, row.mlp_out, row.attn_out, row.final_norm


def _the_one_list(hf: PreTrainedModel) -> str:
    from torch import nn

    depth = hf.config.num_hidden_layers
    lists = [n for n, m in hf.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    outermost = [n for n in lists if not any(n.startswith(other + ".") for other in lists)]
    if len(outermost) != 1:
        raise UserError(
            f"Unknown architecture `{hf.config.model_type}`: {len(outermost)} module lists are as long as "
            f"num_hidden_layers = {depth} ({', '.join(outermost) or 'none'}); exactly one must be.",
            "Add a row for this architecture to arch.py.",
        )
    return outermost[0]


def _is_linear(module: nn.Module) -> bool:
    from torch import nn

    return isinstance(module, nn.Linear) or is_transposed(module)


def _last_ungated(names: list[str]) -> str:
    ungated = [n for n in names if "gate" not in n.rsplit(".", 1)[-1] or "up" in n]
    return (ungated or names or [""])[-1]


def _attention_out(linear: dict[str, nn.Module], hidden: int, mlp_out: str) -> str:
    """The projection out of attention: by convention the last square one before the MLP; empty when there is none."""
    names = [n for n, m in linear.items() if n != mlp_out and out_features(m) == hidden and in_features(m) == hidden]
    return names[-1] if names else ""


def _final_norm(hf: PreTrainedModel, blocks: str) -> str:
    parent = blocks.rsplit(".", 1)[0] if "." in blocks else ""
    root = hf.get_submodule(parent) if parent else hf
    norms = [n for n, m in root.named_children() if "norm" in type(m).__name__.lower()]
    return f"{parent}.{norms[-1]}".lstrip(".") if norms else ""


def _adds_to_stream(hf: PreTrainedModel, row: Arch) -> bool:
    """Whether what is added to the MLP's output arrives unchanged in the block's output: one probe of two tokens."""
    import torch

    block = hf.get_submodule(row.blocks)[0]  # type: ignore[index]
    shift = torch.linspace(-1.0, 1.0, hf.config.hidden_size, device=hf.device, dtype=hf.dtype)
    outputs: list[torch.Tensor] = []
    keep = block.register_forward_hook(lambda m, a, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    try:
        ids = torch.zeros((1, 2), dtype=torch.long, device=hf.device)
        with torch.no_grad():
            hf(input_ids=ids)
            push = block.get_submodule(row.mlp_out).register_forward_hook(lambda m, a, out: out + shift)
            try:
                hf(input_ids=ids)
            finally:
                push.remove()
    finally:
        keep.remove()
    moved = outputs[1] - outputs[0]
    return bool(torch.allclose(moved, shift.expand_as(moved), atol=1e-3))
