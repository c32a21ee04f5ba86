"""Record a training step as a CUDA graph once, and replay it from then on, without the host's work
for each kernel."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Outputs are the losses, one per pass, and the predicted classes.
Outputs = tuple[list[Tensor], Tensor]
Step = Callable[[Tensor, Tensor], Outputs]
# A Capture takes something to do, and returns what does it again, on the same memory.
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
    """A maker of training steps, by a recording where it has one of this shape.

    A recording holds lr and all other numbers as they were: forget() it when they change.

    Args:
        step: turns images and labels into Outputs, and changes the weights.
        capture: records without doing, like a CUDA graph.
    """

    def __init__(self, step: Step, capture: Capture) -> None:
        self._step, self._capture = step, capture
        self._again: Callable[[], Outputs] | None = None
        self._images = self._labels = torch.empty(0)

    def forget(self) -> None:
        """Forget the recording: the next step is recorded anew."""
        self._again = None

    def __call__(self, images: Tensor, labels: Tensor) -> Outputs:
        """Make a step; what it returns is overwritten by nothing."""
        if self._again is None:
            if self._images.shape != images.shape or self._images.stride() != images.stride():
                self._images, self._labels = torch.empty_like(images), torch.empty_like(labels)
            self._again = self._capture(lambda: self._step(self._images, self._labels))
        self._images.copy_(images)
        self._labels.copy_(labels)
        losses, predicted = self._again()
        return [loss.clone() for loss in losses], predicted.clone()
