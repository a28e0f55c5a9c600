"""Lightning's part of docs/trainers.md, where it is installed, in two processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from .documents import blocks, run
from .ranks import run_two
from .test_trainers import (
    LR,
    Bigram,
    assert_same_training,
    examples,
    need,
    page,
    page_of,
    parameters,
    plain_step,
    stack,
)


@pytest.mark.parametrize("check", ["trainer", "fabric"])
def test_two_ranks(check):
    need("lightning")
    run_two("test_lightning", f"check_{check}", NODE_RANK="0")


def batches() -> tuple[list, list]:
    """Four, and this rank's half of them."""
    rows = examples(8)
    every = [stack(rows[i : i + 2]) for i in range(0, 8, 2)]
    return every, every[dist.get_rank() :: 2]


def models() -> tuple:
    torch.manual_seed(0)
    return Bigram(8), Bigram(12)


def check_trainer() -> None:
    """Two steps, of one batch on each rank."""
    from lightning import Trainer

    dist.init_process_group("gloo")
    every, mine = batches()
    student, teacher = models()
    module = page("Lightning")["KDModule"](student, teacher, LR)
    assert len(list(module.parameters())) == len(list(student.parameters()))
    start, plain = parameters(student), models()[0]
    silent = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    options = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "max_epochs": 1, **silent}
    loader = torch.utils.data.DataLoader(mine, batch_size=None)
    Trainer(use_distributed_sampler=False, **options).fit(module, loader)
    for i in (0, 2):
        plain_step(plain, teacher, every[i : i + 2])
    assert_same_training(parameters(student), parameters(plain), start)


def check_fabric() -> None:
    """The page's own loop, a step of two batches on each rank, with Fabric's backward."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=2, strategy="ddp")
    fabric.launch()
    every, mine = batches()
    student, teacher = models()
    start, plain = parameters(student), models()[0]
    wrapped, optimizer = fabric.setup(student, torch.optim.SGD(student.parameters(), LR))
    heading = "Your own loop"
    (code,) = blocks(page_of(heading), heading)
    names: dict = {"fabric": fabric}
    run(code.replace("loss.backward()", "fabric.backward(loss)"), heading, names)
    names["train_step"](wrapped, teacher, optimizer, mine)
    plain_step(plain, teacher, every)
    assert_same_training(parameters(student), parameters(plain), start)
