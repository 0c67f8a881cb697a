"""Model folders: weights from safetensors only, code only when asked for, a fingerprint of what the tensors are."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import experiments
import tiny
from manyedits.errors import UserError
from manyedits.loading import check_folder, fingerprint_of, load_model, random_model


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return experiments.write_model(tmp_path_factory.mktemp("models") / "good", "gpt2")


def copied(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


class Trap:
    """A pickle that leaves a mark when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_pickles_beside_the_weights_are_not_read(good: Path, tmp_path: Path) -> None:
    folder = copied(good, tmp_path)
    for name in ("pytorch_model.bin", "model.bin", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    assert load_model(folder).fingerprint == load_model(good).fingerprint
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("index", "wanted"),
    [
        (
            {"weight_map": {"a": "model.safetensors", "b": "pytorch_model.bin"}},
            "lacks safetensors .* pytorch_model.bin",
        ),
        ({"weight_map": {"a": "model-00001-of-00002.safetensors"}}, "lacks safetensors .* model-00001-of-00002"),
        ({"weight_map": 3}, "is no index"),
        ([], "is no index"),
        ({"weight_map": {"a": ["x"]}}, "is no index"),
    ],
)
def test_every_shard_must_be_there(good: Path, tmp_path: Path, index: Any, wanted: str) -> None:
    folder = copied(good, tmp_path)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap(tmp_path / "ran")))
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=wanted):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


def test_a_fingerprint_is_of_the_tensors_not_of_the_files(good: Path, tmp_path: Path) -> None:
    model = tiny.hf_model("gpt2")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    tiny.tokenizer("gpt2").save_pretrained(tmp_path / "sharded")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert fingerprint_of(tmp_path / "sharded") == fingerprint_of(good)
    narrow = load_model(good, "bfloat16")
    assert narrow.fingerprint == fingerprint_of(good) and narrow.hf.dtype == torch.bfloat16
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-6
    model.save_pretrained(tmp_path / "other")
    assert fingerprint_of(tmp_path / "other") != fingerprint_of(good)


def test_a_folder_without_a_tokenizer_is_one_sentence(good: Path, tmp_path: Path) -> None:
    folder = copied(good, tmp_path)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    check_folder(folder)
    with pytest.raises(UserError, match="has no vocabulary"):
        load_model(folder)


def test_a_random_model_is_the_same_every_time_and_leaves_the_generator_alone(good: Path) -> None:
    spec = {"random": "gpt2", "tokenizer": str(good), "n_embd": 32, "n_layer": 2, "n_head": 4}
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    one, other = random_model(spec, "float32", "cpu", "eager"), random_model(spec, "float32", "cpu", "eager")
    assert torch.equal(torch.rand(3), wanted)
    assert one.fingerprint == other.fingerprint
    assert one.fingerprint != random_model({**spec, "seed": 1}, "float32", "cpu", "eager").fingerprint


CODE = """
open(MARK, "w").write("ran")
from transformers import GPT2Config, GPT2LMHeadModel
class NovelConfig(GPT2Config):
    model_type = "novel"
class Novel(GPT2LMHeadModel):
    config_class = NovelConfig
"""


@pytest.mark.parametrize(("model_type", "trusted", "runs"), [("novel", 0, 0), ("gpt2", 0, 0), ("novel", 1, 1)])
def test_a_models_own_code_runs_only_when_asked_for(
    good: Path, tmp_path: Path, model_type: str, trusted: int, runs: int
) -> None:
    folder, mark = copied(good, tmp_path), tmp_path / "ran"
    config = json.loads((folder / "config.json").read_text())
    config.update(
        model_type=model_type, auto_map={"AutoConfig": "code.NovelConfig", "AutoModelForCausalLM": "code.Novel"}
    )
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(CODE.replace("MARK", repr(str(mark))))
    words = f"from manyedits.loading import load_model; load_model({str(folder)!r}, trust_remote_code={bool(trusted)})"
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, env=environment)
    assert mark.exists() is bool(runs), done.stderr
    if model_type == "novel" and not trusted:
        assert "UserError" in done.stderr
    else:
        assert done.returncode == 0, done.stderr
