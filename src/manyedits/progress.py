"""Whom long work tells how far it is: a terminal with bars, a log with lines, or nobody."""

from __future__ import annotations

import logging
import time
from typing import Protocol

logger = logging.getLogger(__name__)


class Progress(Protocol):
    """Receives the progress of named pieces of work."""

    def start(self, name: str, total: int) -> None:
        """A piece of work begins; ``total`` is its length in its own units."""

    def advance(self, name: str, n: int = 1, **facts: object) -> None:
        """``n`` more units are done; ``facts`` are for the reader."""

    def done(self, name: str) -> None:
        """The piece of work is finished."""


class Silent:
    """Tells nobody."""

    def start(self, name: str, total: int) -> None:
        """Nothing."""

    def advance(self, name: str, n: int = 1, **facts: object) -> None:
        """Nothing."""

    def done(self, name: str) -> None:
        """Nothing."""


class Lines:
    """Plain lines, one every few seconds, for output that is no terminal."""

    def __init__(self, seconds: float = 5.0) -> None:
        self.seconds = seconds
        self._work: dict[str, tuple[int, int, float]] = {}
        self._said = 0.0

    def start(self, name: str, total: int) -> None:
        """Say that the work begins."""
        self._work[name] = (0, total, time.monotonic())
        logger.info("%s: 0/%d", name, total)

    def advance(self, name: str, n: int = 1, **facts: object) -> None:
        """Say how far it is, if the last line is old enough."""
        done, total, since = self._work[name]
        self._work[name] = (done + n, total, since)
        now = time.monotonic()
        if n and now - self._said >= self.seconds:
            self._said = now
            left = (now - since) / (done + n) * (total - done - n)
            logger.info("%s: %d/%d, about %.0f s left", name, done + n, total, max(left, 0))

    def done(self, name: str) -> None:
        """Say that it is finished."""
        _, total, since = self._work.pop(name)
        logger.info("%s: %d done in %.1f s", name, total, time.monotonic() - since)
