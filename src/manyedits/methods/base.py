"""What a method is: a pure function from a model and requests to an edit.

A method never changes the model, loads, saves, moves or undoes anything; it returns changes. What it must remember
across edits (AlphaEdit's history, a running normalisation) is ``Edit.state``, which the core stores and gives back
through ``recall``, so that a restart needs nothing from the method itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from importlib import resources
from typing import Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from manyedits.artifacts import Artifacts
from manyedits.changes import AnyChange
from manyedits.data import Request
from manyedits.data.corpus import Corpus
from manyedits.errors import UserError
from manyedits.model import EditableModel
from manyedits.progress import Progress, Silent
from manyedits.registry import near_miss


class Need(Enum):
    """What a method asks of a model or of its requests; checked before anything is edited."""

    SUBJECT = "requests that name their subject"
    ADDITIVE_MLP = "an MLP whose output is added to the residual stream as it is"
    TRAINING_DATA = "requests to train an editor on"
    STATISTICS = "a text to gather second moments over"


class MethodParams(BaseModel):
    """The parameters of a method: frozen, unknown keys refused, a sentence and a unit for every field."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ValueParams(MethodParams):
    """The search for a target vector, shared by ROME, MEMIT and their kin."""

    fact_token: Literal["subject_last", "subject_first", "subject_first_after_last", "last"] = Field(
        "subject_last", description="The token at which the fact is looked up and the vector is written."
    )
    steps: int = Field(20, ge=1, description="Evaluations of the loss; one optimiser step fewer is made. Count.")
    step_size: float = Field(0.5, gt=0, description="Adam's learning rate, in the units `step_unit` names.")
    step_unit: Literal["absolute", "initial_norm"] = Field(
        "absolute", description="Whether `step_size` is absolute or a share of the initial vector's norm."
    )
    weight_decay: float = Field(0.5, ge=0, description="Weight of |delta| / |initial vector|^2 in the loss. Ratio.")
    clamp: float = Field(4.0, gt=0, description="Largest |delta| as a multiple of the initial vector's norm. Ratio.")
    kl_weight: float = Field(0.0625, ge=0, description="Weight of the KL term that keeps the subject's essence. Ratio.")
    kl_prompt: str = Field("{} is a", description="The prompt of the KL term, with {} for the subject.")
    stop_below: float = Field(0.05, description="A request is finished once its total loss is below this. Nats.")


class ContextParams(MethodParams):
    """Texts put before a prompt, so that a fact does not depend on standing at the beginning."""

    lengths: tuple[tuple[int, int], ...] = Field(
        ((5, 10), (10, 10)), description="Pairs (tokens, how many): texts the model writes itself. Tokens, count."
    )
    texts: tuple[tuple[str, ...], ...] | None = Field(
        None, description="The templates themselves, each with one {}, by type; replaces what the model would write."
    )


class MomentParams(MethodParams):
    """The uncentred second moment of the keys over a corpus."""

    tokens: int = Field(10_000_000, ge=1, description="How much text is read. Tokens.")
    length: int = Field(512, ge=8, description="Length of a piece of text, at most the model's context. Tokens.")
    ridge: float = Field(
        0.0, ge=0, description="Added to the diagonal, as a share of its mean; needed where neurons are silent. Ratio."
    )


@dataclass(frozen=True)
class Edit:
    """The changes that would make a model hold some requests."""

    changes: tuple[AnyChange, ...]
    state: Mapping[str, Tensor] = field(
        default_factory=dict
    )  # what the method must remember across edits; folded in by recall()
    info: Mapping[str, float] = field(default_factory=dict)  # losses, norms: for readers, never read back by code


@dataclass
class Recorder:
    """Receives a method's inner tensors where someone compares them with a reference; absent in ordinary runs."""

    tensors: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, tensor: Tensor) -> None:
        """Keep a copy under a name; the last one under a name stays."""
        self.tensors[name] = tensor.detach().clone()


@dataclass(frozen=True)
class Supplies:
    """What a method may use while it prepares: a store for slow things, text, data, a seed, someone to tell."""

    artifacts: Artifacts
    corpus: Corpus | None = None
    seed: int = 0
    training: tuple[Request, ...] = ()
    progress: Progress = field(default_factory=Silent)


class EditMethod(ABC):
    """One editing method with its parameters."""

    Params: ClassVar[type[MethodParams]]
    batch: ClassVar[int | None] = None  # the most requests one call takes; None: any number
    needs: ClassVar[frozenset[Need]] = frozenset()

    def __init__(self, params: MethodParams) -> None:
        self.params: Any = params
        self.recorder: Recorder | None = None

    def requires(self) -> frozenset[Need]:
        """What this method needs with these parameters."""
        return self.needs

    def prepare(self, model: EditableModel, supplies: Supplies) -> None:  # noqa: B027  (a default, not a gap)
        """Slow work done once per model: statistics, training, an index. Nothing by default."""

    @abstractmethod
    def edit(self, model: EditableModel, requests: Sequence[Request]) -> Edit:
        """The changes that would make the model hold these requests. Leaves the model as it found it."""

    def recall(self, edit: Edit) -> None:  # noqa: B027
        """Take an edit made earlier into the method's own state. Nothing by default."""

    def forget(self) -> None:  # noqa: B027
        """Empty the method's own state, as before the first edit. Nothing by default."""

    def state(self) -> Mapping[str, Tensor]:
        """All that recall() has gathered, in a form that recall() takes; what a snapshot keeps."""
        return {}

    def record(self, name: str, tensor: Tensor) -> None:
        """Hand an inner tensor to the recorder, if there is one."""
        if self.recorder is not None:
            self.recorder.add(name, tensor)


def presets_of(method: str) -> dict[str, dict[str, Any]]:
    """The presets of a method by name: architecture, source, params."""
    file = resources.files("manyedits") / "presets" / f"{method}.yaml"
    return dict(yaml.safe_load(file.read_text(encoding="utf-8")) or {}) if file.is_file() else {}


def preset(method: str, name: str) -> dict[str, Any]:
    """One preset of a method."""
    known = presets_of(method)
    if name not in known:
        raise UserError(
            f"Method `{method}` has no preset `{name}`.{near_miss(name, known)}",
            f"Known presets: {', '.join(sorted(known)) or 'none'}; or give the parameters themselves.",
        )
    return known[name]


def check_model(method: type[EditMethod], name: str, model: EditableModel) -> None:
    """Refuse a model that lacks what the method needs."""
    if Need.ADDITIVE_MLP in method.needs and model.arch.norm_after_mlp:
        raise UserError(
            f"`{name}` cannot edit {model.hf.config.model_type}: there a norm stands between the MLP's output and the "
            "residual stream, and the method's algebra assumes that the output is added as it is.",
            "Choose a method without that assumption (`manyedits list methods`), or another model.",
        )
