"""Traces made up for tests. Everything here is seeded, small, and stands on the three tables of :mod:`tests.made_up.tables`.

tables.py      a segment from its columns (``forward_table``, ``token_table``, ``layer_of``), and what stands around segments:
               ``MemoryTrace``, ``meta_of``, ``geometry``
routers.py     routers, their scores, and the vanilla rule for one row written out (``route_row``)
runs.py        who decides what the columns are: ``block_run`` decodes blocks, ``random_trace`` draws calls of any kind,
               ``written_trace`` takes sets and states written out by hand, ``long_run`` is long
changes.py     a segment with something changed: rows that are padding or not routed, scores left out, calls left out or joined
strategies.py  the same under hypothesis: ``specs``, ``runs``, ``cases``, ``traces``
calls.py       model calls as a recorder hands them to a writer
by_hand.py     a trace on disk from the words of trace-format.md alone; uses nothing of tracer's writer, nor of the above
"""
