"""Every preset that ships: it loads, says where its numbers come from, and fits the model it is named after."""

from __future__ import annotations

import pytest

from manyedits.arch import ARCHS
from manyedits.methods import METHODS
from manyedits.methods.base import presets_of

PRESETS = [(method, name) for method in METHODS.names() for name in presets_of(method)]

#: Blocks of the models that presets are named after.
DEPTHS = {
    "gpt2-medium": 24, "gpt2-large": 36, "gpt2-xl": 48, "gpt-j": 28, "gpt-neox-20b": 44,
    "pythia-160m": 12, "pythia-410m": 24, "pythia-1b": 16, "pythia-2.8b": 32, "pythia-6.9b": 32, "pythia-12b": 36,
    "llama-2-7b": 32, "llama-2-7b-chat": 32, "llama-2-13b": 40, "llama-3-8b": 32, "llama-3.1-8b": 32,
    "mistral-7b": 32, "mistral-7b-instruct": 32, "qwen2.5-7b": 28,
}  # fmt: skip

#: Methods whose presets are published per model; each has one for all of these, published or derived.
EDITORS = ("rome", "r-rome", "memit", "pmet", "emmet", "alphaedit", "ft-l", "ft-m")
ASKED_FOR = [name for name in DEPTHS if name.startswith("pythia")]
ASKED_FOR += ["gpt2-xl", "gpt-j", "llama-2-7b", "llama-2-7b-chat", "mistral-7b", "mistral-7b-instruct"]
ASKED_FOR += ["llama-3-8b", "qwen2.5-7b"]


@pytest.mark.parametrize(("method", "name"), PRESETS)
def test_a_preset_loads_and_names_its_source(method: str, name: str) -> None:
    preset = presets_of(method)[name]
    assert set(preset) == {"architecture", "source", "params"}
    assert preset["architecture"] in {*ARCHS, "any"}
    source = preset["source"]
    assert source.startswith("derived; ") or "@" in source, (
        "a source is a file at a commit, or says what it derives from"
    )
    METHODS.load(method).Params(**preset["params"])


@pytest.mark.parametrize(("method", "name"), PRESETS)
def test_a_preset_edits_layers_that_its_model_has(method: str, name: str) -> None:
    model = name.removesuffix("-paper").removesuffix("-easyedit")
    if model not in DEPTHS:
        assert presets_of(method)[name]["source"].startswith("derived; "), f"{name}: no published model of that name"
        return
    params = METHODS.load(method).Params(**presets_of(method)[name]["params"])
    layers = params.layers if hasattr(params, "layers") else (params.layer,)
    assert list(layers) == sorted(set(layers)) and max(layers) < DEPTHS[model]


@pytest.mark.parametrize("method", EDITORS)
def test_the_models_that_people_edit_have_presets(method: str) -> None:
    assert not {"tiny", *ASKED_FOR} - set(presets_of(method))
