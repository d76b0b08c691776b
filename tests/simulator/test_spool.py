"""Spools give back what was put, in memory and on disk."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from simulator.streams import spool as spools
from simulator.streams.spool import Spool, StreamSpool
from tests.made_up.tables import stream_of


@pytest.mark.parametrize("in_memory", [1, 1 << 20])
def test_tables_come_back_in_order_and_writable(in_memory, monkeypatch):
    monkeypatch.setattr(spools, "IN_MEMORY", in_memory)
    spool, rng = Spool(), np.random.default_rng(0)
    put = {
        key: [
            {"a": rng.integers(0, 9, n), "b": rng.random(n).astype(np.float32), "c": rng.random(n) < 0.5}
            for n in (3, 0, 17)
        ]
        for key in ("x", "y", 5)
    }
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda key: [spool.put(key, table) for table in put[key]], put))
    for key, tables in put.items():
        found = list(spool.tables(key))
        assert len(found) == len(tables)
        for one, other in zip(found, tables, strict=True):
            for name, column in other.items():
                assert one[name].dtype == column.dtype and one[name].tolist() == column.tolist()
                assert one[name].flags.writeable
    assert list(spool.tables("never put")) == []
    spool.close()


def test_streams_come_back_as_they_were():
    spool = StreamSpool()
    streams = [stream_of([[[0, 3], [3]], [[1]]]), stream_of([[]])]
    for stream in streams:
        spool.put_stream((0, 1), stream)
    for found, stream in zip(spool.streams((0, 1)), streams, strict=True):
        for name in spools.COLUMNS:
            assert (getattr(found, name) == getattr(stream, name)).all()
            assert getattr(found, name).dtype == getattr(stream, name).dtype
