"""Shared set-up: no network, one thread, and the folder of shared reference files where it exists."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """Results are compared digit by digit, so every test computes in one thread."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def shared() -> Path:
    """The folder of shared reference files; tests that need it are skipped where it is not."""
    folder = Path(os.environ.get("MANYEDITS_SHARED", Path(__file__).parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip("the folder of shared reference files is not here")
    return folder
