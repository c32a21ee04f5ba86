"""Record a training step as a CUDA graph once, and replay it from then on, without the host's work
for each kernel."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Outputs are the losses, one for each pass, and the predicted classes.
Outputs = tuple[list[Tensor], Tensor]
Step = Callable[[Tensor, Tensor], Outputs]
# A Capture takes a function, and returns a function that repeats its work on the same memory.
Capture = Callable[[Callable[[], Outputs]], Callable[[], Outputs]]


class CudaCapture:
    """A recorder on a stream of its own, where the steps before the recording belong as well:
    autograd remembers the stream of each parameter's gradient."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
        self._pool: Any = None  # the next graph uses the memory of the last one

    def __call__(self, do: Callable[[], Outputs]) -> Callable[[], Outputs]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self.stream):
            outputs = do()
        self._pool = graph.pool()

        def again() -> Outputs:
            graph.replay()
            return outputs

        return again


class GraphedStep:
    """A training step that is recorded when it is first called, and replayed from then on.

    A recording has a fixed shape of the batch, and holds lr and all other numbers as they were:
    call forget() when they change.

    Args:
        step: the function that turns images and labels into Outputs, and changes the weights.
        capture: a Capture that records the work without doing it, as a CUDA graph does.
    """

    def __init__(self, step: Step, capture: Capture) -> None:
        self._step, self._capture = step, capture
        self._again: Callable[[], Outputs] | None = None
        self._images = self._labels = torch.empty(0)

    def forget(self) -> None:
        """Forget the recording: the next step is recorded anew."""
        self._again = None

    def __call__(self, images: Tensor, labels: Tensor) -> Outputs:
        """Take a step. Return copies, which later steps do not overwrite."""
        if self._again is None:
            if self._images.shape != images.shape or self._images.stride() != images.stride():
                self._images, self._labels = torch.empty_like(images), torch.empty_like(labels)
            self._again = self._capture(lambda: self._step(self._images, self._labels))
        self._images.copy_(images)
        self._labels.copy_(labels)
        losses, predicted = self._again()
        return [loss.clone() for loss in losses], predicted.clone()
