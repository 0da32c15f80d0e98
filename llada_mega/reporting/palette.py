"""Colours of block sizes: in the order of the hue, so that neighbouring sizes have neighbouring colours."""

from __future__ import annotations

from collections.abc import Iterable

SERIES_LIGHT = (
    "#0d8a80", "#1782a6", "#2a74c9", "#4a63d3", "#6d54cf",
    "#8f45bf", "#ae3aa2", "#c4387c", "#ce4a52", "#cb6a1e",
)  # fmt: skip
SERIES_DARK = (
    "#35c6b8", "#45b8dd", "#64a8f5", "#8198ff", "#a08cff",
    "#bf82f2", "#dc7ad3", "#f27caf", "#fa8a8c", "#f3a25c",
)  # fmt: skip


def spread(values: Iterable[int]) -> dict[int, int]:
    """An index into the series colours for each value: sorted, and spread over all hues, so that few values are easy
    to tell apart."""
    ordered = sorted(set(values))
    step = (len(SERIES_LIGHT) - 1) / max(len(ordered) - 1, 1)
    return {value: round(index * step) % len(SERIES_LIGHT) for index, value in enumerate(ordered)}


def palette_css() -> str:
    """The CSS variables ``--series-<index>`` for light and dark pages."""

    def variables(colours: Iterable[str]) -> str:
        return " ".join(f"--series-{index}: {colour};" for index, colour in enumerate(colours))

    dark = f"@media (prefers-color-scheme: dark) {{ :root {{ {variables(SERIES_DARK)} }} }}"
    return f":root {{ {variables(SERIES_LIGHT)} }}\n{dark}\n"
