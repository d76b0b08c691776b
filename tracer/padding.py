"""What padding would add: its rows are recorded, and counted by nothing (trace-format.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tracer.files.reader import Trace


def padding_note(trace: Trace) -> str | None:
    """How many padding rows a trace has and what they would add to unique experts; None where it has none.

    Unique experts are means over the (forward, layer) cells of the calls that hold padding, without and with it.
    """
    if not trace.padding_rows:
        return None
    cells = without = added = 0
    for segment in trace.segments():
        padding = segment.padding
        if padding is None:
            continue
        forwards = segment.forwards
        call = np.repeat(np.arange(forwards.num_forwards), np.diff(forwards.row_offsets))
        padded = np.unique(call[padding])
        for layer in segment.layers:
            found = segment.layer(layer, with_weights=False, with_padding=True)
            real = (np.arange(found.expert_ids.shape[1]) < found.count[:, None]) & np.isin(call, padded)[:, None]
            awake = call[:, None] * found.router.num_experts + found.expert_ids
            everything, alone = awake[real], awake[real & ~padding[:, None]]
            cells += int(found.present[padded].sum())
            without += len(np.unique(alone))
            added += len(np.unique(everything)) - len(np.unique(alone))
    share = (
        f"{without / cells:.1f} unique experts a layer there, {(without + added) / cells:.1f} with it" if cells else ""
    )
    return f"Padding is counted nowhere: {trace.padding_rows} of {trace.num_rows} rows" + (
        f" ({share})." if share else "."
    )
