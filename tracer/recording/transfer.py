"""Bring the tensors of one model call to the host in one copy a device, without stopping the model."""

from __future__ import annotations

import numpy as np
import torch

NUMPY = {
    torch.uint8: np.uint8,
    torch.bool: np.bool_,
    torch.int16: np.int16,
    torch.int32: np.int32,
    torch.int64: np.int64,
    torch.float16: np.float16,
    torch.float32: np.float32,
}


class HostCopy:
    """A copy under way: made when the call ends, waited for when its arrays are asked for.

    On CUDA the tensors of a device are packed into one byte buffer and copied to pinned memory on a side stream. On a CPU they
    are handed on as they are, so the caller must own them.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], streams: dict[torch.device, torch.cuda.Stream]):
        self._arrays: dict[str, np.ndarray] = {}
        self._packed: list[tuple[list[tuple[str, torch.Size, torch.dtype]], torch.Tensor, torch.cuda.Event]] = []
        by_device: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
        for name, tensor in tensors.items():
            if tensor.device.type == "cuda":
                by_device.setdefault(tensor.device, []).append((name, tensor))
            else:
                self._arrays[name] = (tensor.detach() if tensor.requires_grad else tensor).numpy()
        for device, named in by_device.items():
            self._start(device, named, streams)

    def _start(self, device: torch.device, named, streams) -> None:
        with torch.cuda.device(device):
            # Wide numbers first, so that every array starts at a multiple of its item size.
            named.sort(key=lambda pair: -pair[1].element_size())
            packed = torch.cat([t.detach().contiguous().view(-1).view(torch.uint8) for _, t in named])
            stream = streams.get(device)
            if stream is None:
                stream = streams[device] = torch.cuda.Stream(device)
            host = torch.empty(packed.shape, dtype=torch.uint8, pin_memory=True)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                host.copy_(packed, non_blocking=True)
                # Keeps the allocator from handing the buffer out again before the copy has read it.
                packed.record_stream(stream)
                done = torch.cuda.Event()
                done.record(stream)
        self._packed.append(([(name, t.shape, t.dtype) for name, t in named], host, done))

    def arrays(self) -> dict[str, np.ndarray]:
        """The tensors as NumPy arrays of the same shapes; waits for the copy if it is still running."""
        for layout, host, done in self._packed:
            done.synchronize()
            # Copied, so that no array keeps pinned memory for itself.
            raw, start = host.numpy().copy(), 0
            for name, shape, dtype in layout:
                kind = np.dtype(NUMPY[dtype])
                end = start + shape.numel() * kind.itemsize
                self._arrays[name] = raw[start:end].view(kind).reshape(tuple(shape))
                start = end
        self._packed = []
        return self._arrays
