"""The one exception of the configuration layer."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """The configuration is wrong. `problems` holds every finding; the message lists them all."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        if len(self.problems) == 1:
            message = self.problems[0]
        else:
            message = "\n".join(
                [f"{len(self.problems)} problems in the configuration:", *(f"- {p}" for p in self.problems)]
            )
        super().__init__(message)
