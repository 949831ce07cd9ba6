"""A progress bar over the results of ``map``, drawn by rich (``pip install fdshare[progress]``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

    from fdshare.pool.stats import PoolStats

__all__ = ["show_progress"]

T = TypeVar("T")


def show_progress(
    results: Iterator[T], progress: Progress | str | bool, total: int | None, stats: Callable[[], PoolStats]
) -> Iterator[T]:
    """Yield ``results`` and draw how many came.

    Args:
        progress: a rich Progress that is running already, a description, or True.
        total: how many will come; None where nobody knows.
        stats: asked for failures and restarts.

    Raises:
        ImportError: rich is not installed.
    """
    try:
        from rich import progress as rich_progress
    except ImportError as error:
        raise ImportError("map(progress=...) needs rich: pip install 'fdshare[progress]'") from error
    if isinstance(progress, rich_progress.Progress):
        return _shown(results, progress, "map", total, stats, own=False)
    bar = rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        rich_progress.MofNCompleteColumn(),
        rich_progress.TextColumn("{task.fields[rate]:.0f}/s"),
        rich_progress.TextColumn("{task.fields[failed]} failed, {task.fields[restarts]} restarts"),
        rich_progress.TimeRemainingColumn(),
    )
    return _shown(results, bar, progress if isinstance(progress, str) else "map", total, stats, own=True)


def _shown(
    results: Iterator[T],
    bar: Progress,
    description: str,
    total: int | None,
    stats: Callable[[], PoolStats],
    own: bool,
) -> Iterator[T]:
    before = stats()
    task = bar.add_task(description, total=total, rate=0.0, failed=0, restarts=0)
    if own:
        bar.start()
    shown_at = began = bar.get_time()
    done = 0

    def show() -> None:
        now = stats()
        fields: dict[str, Any] = {
            "rate": done / max(bar.get_time() - began, 1e-6),
            "failed": now.failed - before.failed,
            "restarts": now.restarts - before.restarts,
        }
        bar.update(task, completed=done, **fields)

    try:
        for value in results:
            done += 1
            if bar.get_time() - shown_at > 0.1:
                show()
                shown_at = bar.get_time()
            yield value
    finally:
        results.close()  # type: ignore[attr-defined]  # a generator
        show()
        if own:
            bar.stop()
