"""What a check of a data folder found, told in the order in which people mend it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from util import DataError, StageError

NAMED = 3  # examples in a message


@dataclass
class Findings:
    """What a check has found so far."""

    facts: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[StageError] = field(default_factory=list)
    next: str = ""  # command

    def attempt(self, check: Callable[..., Any], *given: Any) -> Any:
        """What ``check`` returns; None if it raises a problem, which is noted."""
        try:
            return check(*given)
        except StageError as error:
            self.problems.append(error)
            return None

    def problem(self, where: object, found: str, expected: str, cure: str) -> None:
        self.problems.append(DataError(where, found, expected, cure))

    def lines(self) -> Iterable[str]:
        yield from (f"  {fact}" for fact in self.facts)
        yield from (f"note: {note}" for note in self.notes)
        for number, problem in enumerate(self.problems, start=1):
            yield f"problem {number} of {len(self.problems)}: {problem}"
        yield f"next: {self.next}"


def some(names: Sequence[object]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(map(str, names[:NAMED])) + more


def spaced(number: int, most: int) -> list[int]:
    """At most ``most`` of ``number`` places, evenly, with the first and the last."""
    return np.unique(np.linspace(0, number - 1, min(number, most)).round().astype(int)).tolist()
