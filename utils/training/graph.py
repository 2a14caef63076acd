"""Training on a CUDA GPU with the whole step, from crop to optimizer, in one CUDA graph: no single kernel launches.

The speed of a network like ResNet-32 is bound by kernel launches. The graph holds all kernels: it takes the next batch
of the epoch's plan by a counter on the device, and stores loss and hits, which are read at the end of the epoch. The
steps are those of `train_step`, kernel for kernel.
"""

from collections.abc import Callable

import torch
from torch import nn

from utils.cli import first_line
from utils.data.in_memory import CroppedBatches
from utils.progress import shown
from utils.signals import StopRequest
from utils.training.extra_loss import ExtraLoss
from utils.training.loop import Result, epoch_result, train_step

EAGER_STEPS = 3  # of a run, before the first capture: they make the optimizer's state and warm up the libraries


class GraphedTraining:
    """Trains `model` on `batches` epoch by epoch, as `train_epoch` does.

    The first steps of a run and the short last batch of an epoch run eagerly, all others as replays of one graph. A
    graph freezes the numbers in the optimizer's parameter groups (learning rate, lambda_s, ...): after a change of one,
    the step is captured again. An Adam base must be `capturable`. If a capture fails, `failure` says why, and all steps
    are eager from then on.

    On a CPU there is no graph and every step is eager, over the same buffers: for tests.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: CroppedBatches,
        precision: str,
        extra: ExtraLoss | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        self.model, self.optimizer, self.batches = model, optimizer, batches
        self.precision, self.extra, self.stop = precision, extra, stop
        self.device = batches.split.images.device
        count, steps = len(batches.split), len(batches)
        self.plan = tuple(torch.empty_like(part) for part in batches.plan(0))
        self.window = torch.arange(min(batches.batch_size, count), device=self.device)
        self.position = torch.zeros((), dtype=torch.int64, device=self.device)  # of the next batch's first image
        self.step_index = torch.zeros(1, dtype=torch.int64, device=self.device)
        self.losses = torch.zeros(steps, device=self.device)
        self.hits = torch.zeros(steps, dtype=torch.int64, device=self.device)
        self.eager_left = EAGER_STEPS
        self.failure = ""
        self._replay: Callable[[], None] | None = None
        self._frozen: list[dict] = []

    def epoch(self, number: int, title: str = "epoch") -> Result:
        """One epoch, shown under `title`; raises NonFiniteError at its end if the loss, or a weight, is not finite."""
        self.model.train()
        for held, part in zip(self.plan, self.batches.plan(number)):
            held.copy_(part)
        self.position.zero_()
        self.step_index.zero_()
        count, size = len(self.batches.split), len(self.window)
        steps = shown(range(count // size), title, count // size)
        for _ in self.stop.watch(steps) if self.stop else steps:
            self._full_step()
        if count % size:
            self._step(count % size)
        return epoch_result(self.model, self.losses, self.hits, count)

    def _step(self, size: int) -> None:
        """The step on the next `size` images of the plan."""
        order, shifts, mirrored = self.plan
        where = self.position + self.window[:size]
        images, labels = self.batches.batch(order[where], shifts[:, where], mirrored[where])
        loss, hits = train_step(self.model, self.optimizer, images, labels, self.precision, self.extra)
        self.losses.index_copy_(0, self.step_index, loss[None].float())
        self.hits.index_copy_(0, self.step_index, hits[None])
        self.position.add_(size)
        self.step_index.add_(1)

    def _full_step(self) -> None:
        if self.device.type != "cuda" or self.failure:
            self._step(len(self.window))
            return
        if self.eager_left:
            self.eager_left -= 1
            side = torch.cuda.Stream(self.device)  # a capture needs gradients that were made off the main stream
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                self._step(len(self.window))
            torch.cuda.current_stream(self.device).wait_stream(side)
            return
        numbers = [{k: v for k, v in group.items() if k != "params"} for group in self.optimizer.param_groups]
        if self._replay is None or numbers != self._frozen:
            self._capture()
            self._frozen = numbers
        if self._replay:
            self._replay()
        else:
            self._step(len(self.window))

    def _capture(self) -> None:
        self._replay = None  # frees an old graph's memory before a new one takes its own
        graph = torch.cuda.CUDAGraph()
        now = torch.cuda.current_stream(self.device)
        try:
            # The outer context restores the stream even if a capture that CUDA ended leaves its own in place.
            with torch.cuda.stream(now), torch.cuda.graph(graph, stream=torch.cuda.Stream(self.device)):
                self._step(len(self.window))
        except RuntimeError as error:
            cause = error.__context__ or error  # the end of a broken capture raises an error of its own
            self.failure = first_line(cause)
            return
        self._replay = graph.replay
