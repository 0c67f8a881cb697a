"""Names and places inside a run directory, writes that appear whole, and what made a result.

The run directory is the only interface between editing, measuring and reporting. A file is written under a temporary
name and renamed, so nobody ever reads half of one; a journal line is one write, and a torn last line is dropped.
"""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from filelock import FileLock, Timeout

from manyedits.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

#: What to do about a file of a run that is not what was written.
RESTORE = "Restore it from a copy."

LIBRARIES = ("manyedits", "torch", "transformers", "tokenizers", "safetensors", "numpy", "lm_eval")


# --- writing ----------------------------------------------------------------------------------------------------------


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all. Raises ``UserError`` when the disk refuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        _remove(temporary)
        raise refused(path, error) from error


def append_line(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON line; what a torn earlier line left at the end of the file is cut off first."""
    line = json.dumps(row, sort_keys=True, ensure_ascii=False).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+") as file:
            if file.tell() and not _ends_whole(file):
                file.truncate(_whole_length(path.read_bytes()))
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise refused(path, error) from error


def _ends_whole(file: BinaryIO) -> bool:
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _whole_length(content: bytes) -> int:
    return content.rfind(b"\n") + 1


def _remove(path: Path) -> None:
    try:
        path.unlink()
    except OSError:
        return  # it was never made, or the disk that refused the write refuses this too


#: What to do about a folder of a run that cannot be written.
ELSEWHERE = "Choose another folder with `--out`, or correct its permissions; the run goes on from where it stands."


def refused(path: Path, error: OSError, hint: str = ELSEWHERE) -> UserError:
    """What a refused write means to the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"The disk is full: {path} could not be written.", "Free some space and run the same command again."
        )
    return UserError(f"{path} cannot be written: {error.strerror or error}.", hint)


def write_json(path: Path, content: Any) -> None:
    """Write JSON that appears whole; the same content gives the same bytes."""
    text = json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False, default=str)
    write_atomic(path, (text + "\n").encode())


def save_tensors(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> None:
    """Write a safetensors file with texts beside the tensors; the same content gives the same bytes."""
    from safetensors.torch import save

    ordered = {name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)}
    # One entry, because the order of several in the file's header is not fixed.
    write_atomic(path, save(ordered, metadata={"facts": json.dumps(dict(facts), sort_keys=True)}))


# --- reading ----------------------------------------------------------------------------------------------------------


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines; a torn last line is dropped, a broken one before it is a ``UserError``."""
    if not path.is_file():
        return []
    content = path.read_bytes()
    rows = []
    for number, line in enumerate(content[: _whole_length(content)].splitlines(), 1):
        try:
            rows.append(dict(json.loads(line)))
        except (ValueError, TypeError, RecursionError):
            raise UserError(
                f"{path}, line {number}: not JSON.", "The line was altered; restore it from a copy."
            ) from None
    return rows


def load_tensors(path: Path, hint: str = RESTORE) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and texts of a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no mapping)
            return tensors, dict(json.loads((file.metadata() or {}).get("facts", "{}")))
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}.", hint) from None


def read_json(path: Path, hint: str = RESTORE) -> Any:
    """A JSON file. Raises ``UserError`` when it is missing or not JSON."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"There is no file {path}.", "Is this a run directory?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}.", hint) from None


# --- places -----------------------------------------------------------------------------------------------------------


class RunDir:
    """One run directory: one model, one method, one sequence of requests."""

    def __init__(self, root: Path) -> None:
        self.root = Path(root)

    @property
    def experiment(self) -> Path:
        """The experiment as the user wrote it, comments and all."""
        return self.root / "experiment.yaml"

    @property
    def resolved(self) -> Path:
        """Every value in force, and its digest."""
        return self.root / "resolved.json"

    @property
    def provenance(self) -> Path:
        """Commit, versions, device, seeds."""
        return self.root / "provenance.json"

    @property
    def journal(self) -> Path:
        """A line per batch of requests."""
        return self.root / "journal.jsonl"

    @property
    def snapshot_digests(self) -> Path:
        """A line per snapshot that is complete."""
        return self.root / "snapshots" / "digests.jsonl"

    @property
    def report(self) -> Path:
        """The report in Markdown."""
        return self.root / "report.md"

    def change(self, step: int) -> Path:
        """The changes of the batch that ends at a step."""
        return self.root / "changes" / f"{step:06d}.safetensors"

    def snapshot(self, step: int) -> Path:
        """The edited weights at a step, 32 bit."""
        return self.root / "snapshots" / f"{step:06d}.safetensors"

    def score(self, step: int, benchmark: str) -> Path:
        """A benchmark's figures at a step."""
        return self.root / "scores" / f"{step:06d}" / f"{_file_name(benchmark)}.json"

    def samples(self, step: int, benchmark: str) -> Path:
        """A benchmark's judgements at a step, a row per item."""
        return self.root / "samples" / f"{step:06d}" / f"{_file_name(benchmark)}.jsonl.gz"

    @contextmanager
    def editing(self) -> Iterator[None]:
        """Be the one editor of this directory while inside; any number of others may read and score."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.root / ".editing.lock", timeout=0)
            lock.acquire()
        except Timeout:
            raise UserError(
                f"{self.root} is being edited by another process now.",
                "Wait for it, or run into another folder (`--out`).",
            ) from None
        except OSError as error:
            raise refused(self.root, error) from error
        try:
            yield
        finally:
            lock.release()

    def begin(self, text: str, resolved: Mapping[str, Any], made_by: Mapping[str, Any]) -> None:
        """Write what this run is, or compare with what stands there. Raises ``UserError`` for another experiment's."""
        if self.resolved.is_file():
            self._compare(resolved)
            return
        write_atomic(self.experiment, text.encode())
        write_json(self.provenance, made_by)
        write_json(self.resolved, resolved)

    def _compare(self, resolved: Mapping[str, Any]) -> None:
        there = read_json(self.resolved)
        old, new = there.get("experiment") if isinstance(there, dict) else None, resolved["experiment"]
        if not isinstance(old, dict):
            raise UserError(f"{self.resolved} was altered or written by another program.", RESTORE)
        if there.get("digest") == resolved["digest"]:
            return
        names = sorted(k for k in {*old, *new} if old.get(k) != new.get(k))
        raise UserError(
            f"{self.root} holds the run of another experiment (it differs in {', '.join(names) or 'its form'}).",
            "Run into another folder (`--out`), or restore the experiment file that made this one.",
        )

    def steps_scored(self) -> list[int]:
        """Steps at which something was measured."""
        return sorted(int(p.name) for p in (self.root / "scores").glob("*") if p.name.isdigit())


def _file_name(benchmark: str) -> str:
    return benchmark.replace("/", "_").replace(":", "_")


# --- what made a result -----------------------------------------------------------------------------------------------


def provenance(device: str, seed: int, threads: int) -> dict[str, Any]:
    """Commit of the code with a dirty flag, versions, machine, device, seed and threads."""
    return {
        "code": code_state(Path(__file__).parent),
        "versions": {name: _version(name) for name in LIBRARIES},
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}",
        "device": device,
        "seed": seed,
        "threads": threads,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def code_state(folder: Path) -> dict[str, Any] | None:
    """Commit and dirty flag of the checkout that the code runs from; None outside one."""
    commit = _git(folder, "rev-parse", "HEAD")
    inside = _git(folder, "ls-files", "--error-unmatch", "__init__.py")
    if not commit or not inside:
        return None
    return {"commit": commit, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}


def _git(folder: Path, *words: str) -> str:
    try:
        done = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
