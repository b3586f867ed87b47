"""matplotlib, which only plots need."""

from __future__ import annotations

from typing import Any

from ssmc.errors import UsageError


def load_pyplot() -> Any:
    """matplotlib.pyplot drawing into files; UsageError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UsageError(
            "plots need matplotlib, which is not installed", hint="pip install 'ssmc[bench]'"
        ) from None
    matplotlib.use("agg")
    import matplotlib.pyplot as pyplot

    return pyplot
