"""Blocks of a trace as dicts and sets, which the naive definitions of the figures are made of."""

from __future__ import annotations

from tracer.schema import DENOISE, MASKED, PADDING


def naive_runs(trace):
    """Blocks of requests in the order the figures add them up: (unit, request, block, steps).

    Each step is {offset: (row, state, {layer: set or None})} over the block's rows; ``state`` is "masked" or "known". A
    layer's set is None where the row was not routed. The step itself carries its segment and part.
    """
    number = {}
    for segment in trace.segments():
        forwards = segment.forwards
        starts, _ = forwards.part_rows
        denoise = [n for n in range(len(forwards.kind)) if forwards.kind[n] == DENOISE]
        for n in denoise:
            number.setdefault(int(forwards.request_id[n]), len(number))
        routing = {layer: segment.layer(layer) for layer in segment.layers}
        blocks = {}
        for n in denoise:
            blocks.setdefault((int(forwards.request_id[n]), int(forwards.block[n])), []).append(n)
        for (request, block), parts in sorted(blocks.items()):
            steps = []
            for n in sorted(parts, key=lambda n: int(forwards.step[n])):
                step = Step(segment=segment, part=n, routing=routing)
                branches = max(1, int(forwards.branches[n]))
                rows = int(forwards.num_tokens[n]) // branches
                first = int(starts[n]) + rows * max(0, int(forwards.chosen_branch[n]))
                length = trace.meta.block_length
                for row in range(first, first + rows):
                    position, state = int(segment.tokens.position[row]), int(segment.tokens.state[row])
                    if state != PADDING and position // length == block:
                        step[position % length] = (
                            row,
                            "masked" if state == MASKED else "known",
                            row_sets(routing, row),
                        )
                steps.append(step)
            yield number[request], request, block, steps


class Step(dict):
    """Rows of a step by offset, and where the step lies."""

    def __init__(self, segment, part, routing):
        super().__init__()
        self.segment, self.part, self.routing = segment, part, routing

    def sets(self, layer):
        """{offset: set} of the routed rows in one layer."""
        return {j: sets[layer] for j, (_, _, sets) in self.items() if sets.get(layer)}


def row_sets(routing, row):
    """{layer: frozenset of experts, or None} of one row."""
    return {
        layer: frozenset(int(e) for e in routed.expert_ids[row, : routed.count[row]]) or None
        for layer, routed in routing.items()
    }


def add_up(numbers):
    """Sum from first to last, without the compensation newer Pythons' ``sum`` uses."""
    total = 0
    for number in numbers:
        total = total + number
    return total


def fields(frame, *names):
    """{named columns: the rest of the row} of a frame, each combination once."""
    out = {}
    for row in frame.iter_rows(named=True):
        key = tuple(row.pop(name) for name in names)
        assert key not in out, key
        out[key] = row
    return out


QUICK = {"replicates": 7, "sample_rows": 40, "sample_forwards": 6, "pairs": 30}
"""Bootstrap and sample sizes of tests that are not about them."""
