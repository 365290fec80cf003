"""A stand-in for what `torch.cuda.graph` calls: CUDA graphs, and torch's allocator while they are captured.

As strict as PyTorch's `CUDAGraph.cpp` and `CUDACachingAllocator.cpp`: a pool is taken into a capture and let go by its
graphs, one at a time; one that every graph has left takes no other; a capture that CUDA refuses is not over for the
allocator, which goes on asking its graph.
"""

from typing import Any

import pytest
import torch

REFUSED = "CUDA error: operation not permitted when stream is capturing\nCompile with TORCH_USE_CUDA_DSA"


class AllocatorStandIn:
    """`pools`: the graphs that each has; `underway`: pools that are captured into, and the graphs. `refuses` names the
    method of a graph that CUDA refuses."""

    def __init__(self) -> None:
        self.pools: dict[tuple[int, int], int] = {}
        self.underway: dict[tuple[int, int], int] = {}
        self.refuses = ""
        self.graphs = 0

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        handles = iter(range(1, 10_000))
        nothing: Any = lambda *_: None  # noqa: E731
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, next(handles)))
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: GraphStandIn(self))
        monkeypatch.setattr(torch.cuda.graph, "default_capture_stream", "a stream")
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        for owner, name in ((torch.cuda, "synchronize"), (torch.cuda, "empty_cache"), (torch._C, "_host_emptyCache")):
            monkeypatch.setattr(owner, name, nothing, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)

    def begin(self, pool: tuple[int, int], graph: "GraphStandIn") -> None:
        if self.pools.get(pool, 1) == 0:
            raise RuntimeError("it->second->use_count > 0 INTERNAL ASSERT FAILED")
        if pool in self.underway:
            raise RuntimeError("beginAllocateToPool: already recording to mempool_id")
        self.pools[pool] = self.pools.get(pool, 0) + 1
        self.underway[pool] = id(graph)

    def end(self, device: int, pool: tuple[int, int]) -> None:
        if self.underway.pop(pool, None) is None:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    def release(self, device: int, pool: tuple[int, int]) -> None:
        assert self.pools[pool] > 0
        self.pools[pool] -= 1


class GraphStandIn:
    def __init__(self, allocator: AllocatorStandIn) -> None:
        self._allocator = allocator
        self._pool: tuple[int, int] = 0, 0
        self._ended = False

    def capture_begin(self, pool: tuple[int, int], capture_error_mode: str, check_input_liveness: bool) -> None:
        assert capture_error_mode == "thread_local", "other threads would end this capture"
        self._pool = pool
        self._allocator.begin(pool, self)
        if self._allocator.refuses == "capture_begin":
            raise RuntimeError(REFUSED)

    def capture_end(self) -> None:
        if self._allocator.refuses == "capture_end":
            raise RuntimeError(REFUSED)
        self._allocator.end(0, self._pool)
        self._ended = True
        self._allocator.graphs += 1

    def replay(self) -> None:
        assert self._ended, "Called CUDAGraph::replay without a preceding successful capture."

    def __del__(self) -> None:
        if self._ended:
            self._allocator.release(0, self._pool)
            self._allocator.graphs -= 1
