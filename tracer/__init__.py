"""The trace format and what makes traces.

* ``open_trace(path)`` opens a trace, ``check(path)`` lists its faults, ``describe(trace)`` says what it holds;
* ``with record(model, path):`` records any decoding;
* ``run_capture(plan_capture(model, path, prompts, CaptureOptions()))`` decodes prompts with the loops that come along.

Each is imported when it is first asked for: reading traces needs no torch.
"""

from tracer.packages import offered

_HOMES = {
    "CaptureOptions": "tracer.capture_plan",
    "TraceWriter": "tracer.parquet",
    "check": "tracer.checking",
    "describe": "tracer.summary",
    "open_trace": "tracer.parquet",
    "plan_capture": "tracer.capture_plan",
    "record": "tracer.recording.context",
    "run_capture": "tracer.capture",
}
__all__ = list(_HOMES)
__getattr__ = offered(__name__, _HOMES)
