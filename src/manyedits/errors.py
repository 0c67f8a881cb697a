"""Errors that the user can mend: what is wrong, with the value, and what to do; shown without a traceback."""

from __future__ import annotations

from collections.abc import Sequence


class UserError(Exception):
    """Something the user can mend. ``what`` is a sentence with the value in it, ``hint`` says what to do."""

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what, hint)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what} {self.hint}".strip()


class Mistakes(UserError):
    """Several mistakes at once, so that a file is mended in one go."""

    def __init__(self, errors: Sequence[UserError]) -> None:
        self.errors = tuple(errors)
        if len(self.errors) == 1:
            super().__init__(self.errors[0].what, self.errors[0].hint)
        else:
            listed = "\n".join(f"  {i}. {error}" for i, error in enumerate(self.errors, 1))
            super().__init__(f"{len(self.errors)} mistakes:\n{listed}")


def raise_all(errors: Sequence[UserError]) -> None:
    """Raise what was gathered, if anything was."""
    if errors:
        raise Mistakes(errors)
