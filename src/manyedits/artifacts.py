"""A store for what is slow to make and depends only on its key: statistics, contexts, trained editors.

An artifact's place is a digest of everything it depends on, so a stale one cannot be found. A second process that wants
the same one waits for the first. A builder gets a folder for notes of progress; it is kept until the artifact is done, so
that a stopped build goes on.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from platformdirs import user_cache_dir

from manyedits import rundir

if TYPE_CHECKING:
    from torch import Tensor

#: What to do about a damaged file of the store.
AGAIN = "Delete it; it is made again."

logger = logging.getLogger(__name__)


def default_root() -> Path:
    """``$MANYEDITS_CACHE``, else the platform's folder for caches."""
    return Path(os.environ.get("MANYEDITS_CACHE") or user_cache_dir("manyedits"))


class Artifacts:
    """The store under one folder."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    def get_or_build(
        self, kind: str, key: Mapping[str, Any], build: Callable[[Path], Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Tensors by name: from the store, or built now and kept. ``build`` gets a folder for notes of progress."""
        place = self.place(kind, key, ".safetensors")
        with self._alone(place):
            if not place.is_file():
                notes = place.with_suffix(".parts")
                rundir.save_tensors(place, build(notes), {"key": canonical(key)})
                shutil.rmtree(notes, ignore_errors=True)
        return rundir.load_tensors(place, AGAIN)[0]

    def get_or_build_json(self, kind: str, key: Mapping[str, Any], build: Callable[[], Any]) -> Any:
        """The same for anything JSON can hold."""
        place = self.place(kind, key, ".json")
        with self._alone(place):
            if not place.is_file():
                rundir.write_json(place, {"key": json.loads(canonical(key)), "value": build()})
        return rundir.read_json(place, AGAIN)["value"]

    def place(self, kind: str, key: Mapping[str, Any], suffix: str) -> Path:
        """Where an artifact lies, or would."""
        return self.root / kind / (hashlib.sha256(canonical(key).encode()).hexdigest()[:16] + suffix)

    @contextmanager
    def _alone(self, place: Path) -> Iterator[None]:
        lock = FileLock(str(place) + ".lock")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=0)
        except Timeout:
            logger.warning("waiting for another process that is making %s", place.name)
            lock.acquire()
        except OSError as error:
            raise rundir.refused(place, error, "Set MANYEDITS_CACHE to a folder that can be written.") from error
        try:
            yield
        finally:
            lock.release()


def canonical(key: Mapping[str, Any]) -> str:
    """A key as text that does not depend on the order in which it was written."""
    return json.dumps(key, sort_keys=True, default=str)
