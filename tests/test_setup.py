"""The optimizer that train.py's flags ask for."""

import pytest
import torch

import train
from utils.training.setup import build_goal, build_optimizer


@pytest.mark.parametrize("flags, step", [
    ("--psg 0 --lr 0.1", [0.1, 0.19]),  # momentum 0.9: 0.1 * g, then 0.1 * (0.9 + 1) * g
    ("--psg 0 --lr 0.1 --adam 1", [0.1, 0.1]),  # Adam's steps are the learning rate, whatever lambda_s is
    ("--lr 0.1 --eps 2", [0.2, 0.38]),  # on its grid a weight moves by eps alone
    ("--lr 0.1 --eps 2 --adam 1 --psg_acts_on update", [0.2, 0.2]),  # eps times the rate
    ("--psg 0 --lr 0.1 --adam 1 --w_decay 0.5", [0.1, 0.1]),  # L2 is a part of the gradient, whose size does not count
    ("--psg 0 --lr 0.1 --adam 1 --w_decay 0.5 --decoupled_decay 1", [0.15, 0.15]),  # AdamW takes lr * 0.5 of a weight
    ("--lr 0.1 --l1 3", [0.3, 0.57]),  # PSG does not scale the penalty
])  # fmt: skip
def test_steps_of_the_base_optimizer(net, flags, step):
    args = train.parser().parse_args(["--w_bit", "4", "--w_decay", "0", *flags.split()])
    weight = net.conv2.weight
    optimizer = build_optimizer(args, net, build_goal(args), torch.device("cpu"), steps=9)
    for expected in step:
        with torch.no_grad():
            weight.fill_(1)
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, 0 if args.l1 else 1)
        optimizer.step()
        assert torch.allclose(1 - weight, torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize("adam", [0, 1])
@pytest.mark.parametrize("flags, moves", [("--psg_acts_on update", False), ("--psg 0", True)])
def test_the_base_has_no_momentum_where_psg_scales_its_steps(net, flags, moves, adam):
    args = train.parser().parse_args([*f"{flags} --adam {adam} --lr 0.1 --w_bit 4 --w_decay 0".split()])
    optimizer = build_optimizer(args, net, build_goal(args), torch.device("cpu"), steps=9)
    for gradient in (1.0, 0.0):
        before = net.conv2.weight.detach().clone()
        for parameter in net.parameters():
            parameter.grad = torch.full_like(parameter, gradient)
        optimizer.step()
    assert torch.equal(net.conv2.weight, before) != moves
