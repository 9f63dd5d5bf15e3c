"""Shared by tests: where the optional development data lies, and the golden-number recipe."""

from __future__ import annotations

from pathlib import Path

SHARED = Path(__file__).resolve().parents[2] / "shared"
