"""Progress bars on stderr, nowhere else and only where somebody looks at it; rich is imported when a bar is shown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress(shown: bool, *extra: str) -> Iterator[Any]:
    """A rich progress bar with rate and time left; ``extra`` names further fields shown after it."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = [
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        *(TextColumn("{task.fields[" + name + "]}") for name in extra),
    ]
    with Progress(*columns, console=Console(stderr=True), disable=not (shown and sys.stderr.isatty())) as bars:
        yield bars


@contextmanager
def bar(name: str, shown: bool, calls: int | None = None) -> Iterator[Callable[..., None]]:
    """A bar over model calls; yields the callback ``(done, total)`` that moves it."""
    with progress(shown) as bars:
        task = bars.add_task(name, total=calls)
        yield lambda done, total=calls: bars.update(task, completed=done, total=total)


def with_bar(run_capture: Callable[..., Any], plan: Any, shown: bool) -> Any:
    """What ``tracer.capture.run_capture`` returns for a plan, under a bar over its tokens."""
    with progress(shown, "rate", "size") as bars:
        task = bars.add_task(f"capture {plan.loaded.id}", total=plan.total_tokens, rate="", size="")

        def on_step(tokens: int, tokens_per_second: float, written: int) -> None:
            size = f"{written / 1e6:.1f} MB"
            bars.update(task, completed=tokens, rate=f"{tokens_per_second:.0f} tokens/s", size=size)

        return run_capture(plan, on_step)
