"""The file layer's two doors: ``open_trace`` and ``TraceWriter``. The format is described by :mod:`tracer.schema`."""

from tracer.files.reader import Trace, open_trace
from tracer.files.writer import TraceWriter

__all__ = ["Trace", "TraceWriter", "open_trace"]
