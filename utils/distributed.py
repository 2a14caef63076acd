"""The processes of one training run: torchrun starts them, and each reads its rank from the environment."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class World:
    """This process's rank and the number of processes; by default it is the only one."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, indices: Tensor) -> Tensor:
        """This process's part of `indices` [N]: parts of nearly equal length, in order."""
        return indices if self.size == 1 else indices.tensor_split(self.size)[self.rank]

    def sum(self, values: Tensor) -> Tensor:
        """`values` summed over all processes, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(values)
        return values

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """A block that the first process runs before the others, such as a download."""
        if not self.is_main:
            torch.distributed.barrier()
        yield
        if self.is_main and self.size > 1:
            torch.distributed.barrier()

    def wrap(self, model: nn.Module) -> nn.Module:
        """`model` with gradients averaged over all processes; batch norm sees only a process's own images."""
        if self.size == 1:
            return model
        device = next(model.parameters()).device
        ids = [device] if device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def agree(self, model: nn.Module) -> None:
        """Gives every process the buffers, such as batch-norm statistics, of the first one."""
        if self.size > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, 0)


ALONE = World()


def own_device(name: str | None, cu_num: int) -> tuple[str | None, int]:
    """Device name and GPU number for `select_device`: those given, but under torchrun each process has its own GPU."""
    if "LOCAL_RANK" not in os.environ:
        return name, cu_num
    rank = int(os.environ["LOCAL_RANK"])
    return (f"cuda:{rank}" if name and name.startswith("cuda") else name), rank


def join(device: torch.device) -> World:
    """Joins the processes that torchrun's environment describes; ALONE without torchrun.

    From then on only the first process prints.
    """
    if "WORLD_SIZE" not in os.environ or int(os.environ["WORLD_SIZE"]) == 1:
        return ALONE
    torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    world = World(torch.distributed.get_rank(), torch.distributed.get_world_size())
    if not world.is_main:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - for the rest of the process
    return world


def leave(world: World) -> None:
    """Leaves the processes that `join` joined, once all of them have come here."""
    if world.size > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
