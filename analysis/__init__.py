"""What traces and replays say.

* ``consistency(trace)`` measures how stable routing is, each figure beside its nulls;
* ``report(path, traces, results)`` writes one page about traces and replays;
* ``diff(a, b)`` compares two of either.

Each is imported when it is first asked for.
"""

from tracer.packages import offered

_HOMES = {"consistency": "analysis.metrics", "diff": "analysis.comparing", "report": "analysis.reporting"}
__all__ = list(_HOMES)
__getattr__ = offered(__name__, _HOMES)
