"""Models from folders, from the hub, from the embedded world and from bare configs.

Weights are read from safetensors only and remote code never runs unless the user asks for it. A checkpoint's fingerprint
is taken over its tensors as they lie in the files, so it does not depend on the type the model runs in.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from manyedits.errors import UserError
from manyedits.model import EditableModel, tensors_digest
from manyedits.registry import near_miss

logger = logging.getLogger(__name__)

ModelRef = str | Path | Mapping[str, Any]

#: Keys of a random model that are not its config's.
RANDOM_KEYS = ("random", "tokenizer", "seed")


def load_model(
    ref: ModelRef,
    dtype: str = "float32",
    device: str = "cpu",
    attention: str = "eager",
    trust_remote_code: bool = False,
) -> EditableModel:
    """An editable model from a folder, ``name@revision`` on the hub, ``world:m``, or ``{"random": "llama", ...}``.

    ``dtype`` is the type the model runs in; edited weights have 32-bit masters in any case. Raises ``UserError`` for
    everything the user can mend.
    """
    if isinstance(ref, Mapping):
        return random_model(dict(ref), dtype, device, attention)
    folder, fingerprint = _locate(str(ref))
    tokenizer = _tokenizer(folder, trust_remote_code)
    hf = _weights(folder, dtype, attention, trust_remote_code)
    return EditableModel(hf.to(device), tokenizer, fingerprint)  # type: ignore[arg-type]


def _locate(ref: str) -> tuple[Path, str]:
    """The folder of a reference, and its fingerprint."""
    folder = local_folder(ref) or _download(ref)
    check_folder(folder)
    return folder, fingerprint_of(folder)


def local_folder(ref: str) -> Path | None:
    """The folder that a reference names on this machine, or None when it must come from the hub."""
    if ref.startswith("world:"):
        try:
            from manyedits.world.models import path_of
        except ModuleNotFoundError:
            raise UserError(
                f"This installation has no embedded world, so there is no model `{ref}`.", "Give a model folder."
            ) from None
        return path_of(ref)
    path = Path(ref).expanduser()
    if path.is_dir():
        return path
    if ref.startswith((".", "/", "~")) or len(Path(ref).parts) != 2 or path.exists():
        raise UserError(
            f"There is no model folder `{ref}`.",
            "Give a folder with a config.json and safetensors, a hub name like owner/name@revision, or world:m.",
        )
    return None


def check_folder(folder: Path) -> None:
    """Refuse a folder that is not a safetensors checkpoint, saying what is missing; opens headers only."""
    read_config(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        other = ", ".join(sorted(p.name for p in folder.glob("*.bin"))) or "no weights at all"
        raise UserError(
            f"{folder} has no safetensors file ({other}); pickled weights are never read, since they can run code.",
            "Save the model with `save_pretrained(..., safe_serialization=True)`.",
        )
    _check_shards(folder, {file.name for file in files})
    for file in files:
        _open(file)


def _check_shards(folder: Path, there: set[str]) -> None:
    """Every shard that the index names must be here and be safetensors."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index} is no index of safetensors.", "Copy the model folder again.") from None
    if named - there:
        some = ", ".join(sorted(str(name) for name in named - there)[:3])
        raise UserError(f"{folder} lacks safetensors that its index names: {some}.", "Copy the model folder again.")


def read_config(folder: Path) -> dict[str, Any]:
    """A model folder's config.json. Raises ``UserError`` when it is none."""
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} is not a model folder: it has no config.json.", "Name the folder that holds one.")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}.", "Copy the model folder again.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error}.", "Correct its permissions.") from None
    if not isinstance(content, dict) or not isinstance(content.get("model_type"), str):
        raise UserError(f"{path} names no model_type.", "Is it the config of a transformers model?")
    return content


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read as safetensors: {error}.", "Copy the file again.") from None


def fingerprint_of(folder: Path) -> str:
    """sha256 over the tensors of a checkpoint: name, type, shape and bytes, in the order of the names."""
    where = {name: file for file in sorted(folder.glob("*.safetensors")) for name in _open(file).keys()}  # noqa: SIM118  (no mapping)
    total = hashlib.sha256()
    for name in sorted(where):
        with _open(where[name]) as file:
            total.update(tensors_digest({name: file.get_tensor(name)}).encode())
    return total.hexdigest()


def _download(ref: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    name, _, revision = ref.partition("@")
    try:
        patterns = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja"]
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"The model `{ref}` is neither a folder nor to be had from the hub: {first}",
            "Check the name and the network, accept the model's licence on the hub, or give a local folder.",
        ) from None


def _tokenizer(folder: Path, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"{folder} holds no usable tokenizer: {_first_line(error)}", "Add its tokenizer.json."
        ) from None
    if not tokenizer.is_fast:
        raise UserError(f"The tokenizer in {folder} gives no character offsets.", "Add its tokenizer.json.")
    # Without its files a tokenizer is made all the same, with nothing but special tokens in it.
    if not set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):
        raise UserError(f"The tokenizer in {folder} has no vocabulary.", "Add its tokenizer.json.")
    return tokenizer  # type: ignore[no-any-return]


def _weights(folder: Path, dtype: str, attention: str, trust_remote_code: bool) -> PreTrainedModel:
    try:
        hf, found = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=getattr(torch, dtype),
            attn_implementation=attention,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"The model in {folder} cannot be loaded: {_first_line(error)}",
            "Is the folder complete, and is it a causal language model?",
        ) from None
    if found["missing_keys"]:
        some = ", ".join(sorted(found["missing_keys"])[:3])
        raise UserError(
            f"The checkpoint in {folder} lacks {len(found['missing_keys'])} weights of its config ({some}, ...).",
            "Is the folder complete, and does config.json belong to these weights?",
        )
    return hf  # type: ignore[no-any-return]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def random_model(spec: dict[str, Any], dtype: str, device: str, attention: str) -> EditableModel:
    """A model with random weights from its config: ``{"random": "llama", "tokenizer": FOLDER, "seed": 0, ...}``.

    Every other key is the config's. The weights are drawn in 32 bit from a generator of their own, so the global one is
    left as it was.
    """
    config = random_config(spec)
    kind, seed, where = spec["random"], spec.get("seed", 0), str(spec["tokenizer"])
    tokenizer = _tokenizer(local_folder(where) or Path(where), trust_remote_code=False)
    if "vocab_size" not in spec:
        config.vocab_size = len(tokenizer)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            hf = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    except (ValueError, KeyError, TypeError, RuntimeError, ArithmeticError) as error:
        raise UserError(
            f"No random model `{kind}`: {_first_line(error)}", "Check the keys against its config."
        ) from None
    fingerprint = tensors_digest(hf.state_dict())
    return EditableModel(hf.to(device=device, dtype=getattr(torch, dtype)), tokenizer, fingerprint)


def random_config(spec: Mapping[str, Any]) -> PreTrainedConfig:
    """The config of a random model. Raises ``UserError`` for all that can be wrong without making the model."""
    kind, where, seed = spec.get("random"), spec.get("tokenizer"), spec.get("seed", 0)
    if kind is None:
        raise UserError("A model given as a mapping must be a random one.", "Write `model: {random: llama, ...}`.")
    if str(kind) not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        near = near_miss(str(kind), MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise UserError(f"There is no random model `{kind}`.{near}", "Give the model_type of a causal language model.")
    if not isinstance(where, str):
        raise UserError("A random model needs a tokenizer.", "Add `tokenizer: FOLDER` beside `random`.")
    if type(seed) is not int:
        raise UserError(f"The seed of a random model is {seed!r}, not an integer.", "Correct it.")
    local_folder(where)
    try:
        return AutoConfig.for_model(str(kind), **{k: v for k, v in spec.items() if k not in RANDOM_KEYS})
    except (ValueError, KeyError, TypeError, ArithmeticError, StrictDataclassError) as error:
        raise UserError(
            f"No random model `{kind}`: {' '.join(str(error).split())}", "Check the keys against its config."
        ) from None
