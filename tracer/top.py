"""The largest of a row, which capture and replay choose alike."""

from __future__ import annotations

import numpy as np

from tracer.jit import njit


@njit
def plain_top(selection, wanted, best, ids):
    """The ``wanted`` (1 or more) largest of ``selection`` [E], by descending value, into ``ids``; how many there are.

    Missing ones (NaN) are never chosen. ``best`` float32 [wanted] is working memory.
    """
    found = 0
    bound = np.float32(-np.inf)
    for e in range(len(selection)):
        v = selection[e]
        if not v > bound:
            continue
        at = found if found < wanted else wanted - 1
        while at > 0 and best[at - 1] < v:
            best[at] = best[at - 1]
            ids[at] = ids[at - 1]
            at -= 1
        best[at] = v
        ids[at] = e
        if found < wanted:
            found += 1
        if found == wanted:
            bound = best[wanted - 1]
    return found
