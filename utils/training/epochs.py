"""The epochs of a run, by the loop that fits: one CUDA graph on a GPU, else step by step."""

from dataclasses import dataclass

import torch
from torch import nn

from utils.cli import UserError, first_line
from utils.data.in_memory import CroppedBatches
from utils.data.split import TrainBatches
from utils.distributed import ALONE, World
from utils.progress import shown
from utils.signals import StopRequest
from utils.training.extra_loss import ExtraLoss
from utils.training.graph import GraphedTraining
from utils.training.loop import Result, train_epoch


@dataclass
class Training:
    """Trains `model` on `batches`, with gradients averaged over the processes of `world`.

    `use_graph` asks for a CUDA graph, which needs a GPU, one process and a data set on the device. After `stop` has
    noted a signal, an epoch raises Stopped. With `compile`, torch.compile compiles the network's forward and backward
    pass, once for each batch size.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    batches: TrainBatches
    precision: str
    extra: ExtraLoss | None = None
    world: World = ALONE
    use_graph: bool = True
    stop: StopRequest | None = None
    compile: bool = False

    def __post_init__(self) -> None:
        self._graphed: GraphedTraining | None = None
        if self.compile:
            self.model.compile(dynamic=False)  # copies of it, such as for evaluation, are not compiled
        self._parallel = self.world.wrap(self.model)
        batches = self.batches
        if not (self.use_graph and self.world.size == 1 and isinstance(batches, CroppedBatches)):
            return
        if batches.split.device.type == "cuda":
            for group in self.optimizer.param_groups:
                if "capturable" in group:  # Adam needs it, also in a run that began on another device
                    group["capturable"] = True
            self._graphed = GraphedTraining(self.model, self.optimizer, batches, self.precision, self.extra, self.stop)

    @property
    def loop(self) -> str:
        """Which loop is used, in words."""
        failed = self._graphed and self._graphed.failure
        if failed:
            return f"plain loop, because the CUDA graph could not be captured ({failed})"
        return "CUDA graph" if self._graphed else "plain loop"

    def epoch(self, number: int, title: str) -> Result:
        """Loss and accuracy of one epoch; see `train_epoch`. Its progress is shown under `title`.

        Raises UserError if torch.compile lacks a dependency such as a C++ compiler.
        """
        try:
            return self._epoch(number, title)
        except RuntimeError as error:
            if self.compile and isinstance(error, torch._dynamo.exc.BackendCompilerFailed):
                raise UserError(f"--compile 1 does not work here ({first_line(error)}): leave it out") from None
            raise

    def _epoch(self, number: int, title: str) -> Result:
        if self._graphed and not self._graphed.failure:
            return self._graphed.epoch(number, title)
        progress = shown(self.batches.epoch(number), title, len(self.batches), silent=not self.world.is_main)
        batches = self.stop.watch(progress) if self.stop else progress
        result = train_epoch(
            self._parallel, self.optimizer, batches, self.precision, self.extra, self.world, self.batches.sizes
        )
        self.world.agree(self.model)
        return result
