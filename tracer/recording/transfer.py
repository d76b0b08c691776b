"""Bring the tensors of one model call to the host in one copy a device, without stopping the model."""

from __future__ import annotations

from collections.abc import Callable

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

    ``convert(name, tensor)`` gives every tensor its final dtype. On CUDA the converted tensors of a device are packed into one
    byte buffer and copied to pinned memory on a side stream. Those on a CPU must be the caller's own; they are converted when
    asked for, out of the model's way.
    """

    def __init__(
        self,
        tensors: dict[str, torch.Tensor],
        convert: Callable[[str, torch.Tensor], torch.Tensor],
        streams: dict[torch.device, torch.cuda.Stream],
    ):
        self._convert = convert
        self._here: dict[str, torch.Tensor] = {}
        self._arrays: dict[str, np.ndarray] = {}
        self._packed: list[tuple[list[tuple[str, torch.Size, torch.dtype]], torch.Tensor, torch.cuda.Event]] = []
        by_device: dict[torch.device, list[tuple[str, torch.Tensor]]] = {}
        for name, tensor in tensors.items():
            if tensor.is_cuda:
                by_device.setdefault(tensor.device, []).append((name, convert(name, tensor)))
            else:
                self._here[name] = tensor
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
        for name, tensor in self._here.items():
            self._arrays[name] = self._convert(name, tensor.detach()).numpy()
        self._here = {}
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
