"""A function that is called again and again, recorded as a CUDA graph.

Launching the kernels of a decode step one by one takes the host several times as long as a GPU
takes to run them. As a graph, they are launched at once.
"""

from collections.abc import Callable

import torch

from opd.distributed import announce
from opd.generation.layer_counter import LayerCounter


def cuda_graph(function: Callable[[], None]) -> Callable[[], None]:
    """Record the kernels of a function, without running them; returns what runs them.

    They run on the memory that the function's tensors have now: it must change them in place, and
    nothing that it reads may move. Values on the host stay what they are now.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        # Other threads may go on allocating: the loader pins memory.
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            function()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(stream)
    return graph.replay


# By type of device; a recorder takes a function and returns what does the same.
RECORDERS: dict[str, Callable[[Callable[[], None]], Callable[[], None]]] = {"cuda": cuda_graph}


class Repeated:
    """Calls a function without arguments. With a recorder, the first call runs as it is, which
    compiles kernels and makes libraries allocate what they need; the second one is recorded, and it
    and all later ones are replayed. Where recording fails, all calls run as they are, and a line on
    stderr says why.

    A recording lives no longer than this object, so that weights may change and move between two of
    them.

    Args:
        counter: counts the layers of a replayed call, too.
    """

    def __init__(
        self,
        function: Callable[[], None],
        record: Callable[[Callable[[], None]], Callable[[], None]] | None = None,
        counter: LayerCounter | None = None,
    ) -> None:
        self.function, self.record, self.counter = function, record, counter or LayerCounter()
        self.calls, self.replay = 0, function
        self.counted: dict[str, int] = {}

    def __call__(self) -> None:
        self.calls += 1
        if self.record is None:
            self.function()
        elif self.calls == 1:
            before = dict(self.counter.tokens)
            self.function()
            self.counted = {k: n - before.get(k, 0) for k, n in self.counter.tokens.items()}
        else:
            before = dict(self.counter.tokens)
            if self.calls == 2:
                self._start()
            self.replay()
            self.counter.tokens = {k: n + self.counted.get(k, 0) for k, n in before.items()}

    def _start(self) -> None:
        assert self.record is not None
        try:
            self.replay = self.record(self.function)
        except RuntimeError as error:  # nothing of a recording that failed has run
            reason = str(error).splitlines()[0]
            announce(f"decoding launches its kernels one by one, without a CUDA graph: {reason}")
