"""YAML as plain values, safely: few aliases, few brackets. Needs no torch, as ``--config`` does."""

from __future__ import annotations

from typing import Any

import yaml

MOST_BRACKETS, MOST_ALIASES = 500, 20  # of a YAML file


class _PlainLoader(yaml.SafeLoader):
    """With few aliases: by many, a few lines become more than any memory holds once printed."""

    aliases = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self.aliases += self.check_event(yaml.AliasEvent)
        if self.aliases > MOST_ALIASES:
            raise yaml.YAMLError(f"more than {MOST_ALIASES} aliases (*name)")
        return super().compose_node(parent, index)


def read_yaml(text: str) -> Any:
    """Plain values. Raises YAMLError, or ValueError or RecursionError for odd content."""
    if text.count("[") + text.count("{") > MOST_BRACKETS:  # nested, they take quadratic time
        raise ValueError(f"more than {MOST_BRACKETS} brackets")
    return yaml.load(text, _PlainLoader)
