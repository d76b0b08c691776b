"""Replay traces under other policies, budgets and machines.

* ``replay(trace, routing, residency, hardware)`` answers with runs, ``sweep`` with a table of many;
* ``find_interval`` chooses TIDE's refresh interval, ``parallel_runs`` loads groups of GPUs;
* ``load_policy(axis, spec)`` makes a policy of its spec.
"""

from tracer.packages import offered

_HOMES = {
    "find_interval": "simulator.interval",
    "load_policy": "simulator.registry",
    "parallel_runs": "simulator.parallel",
    "replay": "simulator.replaying",
    "sweep": "simulator.sweeping",
}
__all__ = list(_HOMES)
__getattr__ = offered(__name__, _HOMES)
