"""DeepSpeed, where it is installed: docs/trainers.md and LinearKDHead with ZeRO-2 and ZeRO-3.

tests/requirements-frameworks.txt says how to install it; it runs on a CPU, in two processes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from kdkernels import LinearKDHead, linear_kd_loss

from .ranks import run_two
from .test_trainers import (
    CE_WEIGHT,
    HUGGING_FACE,
    LR,
    TEMPERATURE,
    TRAINERS,
    Bigram,
    assert_same_training,
    examples,
    llama,
    logged,
    need,
    page,
    parameters,
    plain_step,
    stack,
    train,
)


def test_loop_in_two_ranks():
    need("deepspeed")
    run_two("test_deepspeed", "check_loop", DS_ACCELERATOR="cpu")


def test_heads_in_two_ranks():
    need("deepspeed")
    run_two("test_deepspeed", "check_heads", DS_ACCELERATOR="cpu")


def test_trainer_in_two_ranks():
    need("deepspeed", *HUGGING_FACE)
    run_two("test_deepspeed", "check_trainer", DS_ACCELERATOR="cpu")


def configuration(stage: int) -> dict[str, Any]:
    zero = {"stage": stage, "stage3_param_persistence_threshold": 0}  # or small weights stay whole
    return {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
    }


def engine_of(model, stage: int, trained=None):
    """An engine of the model; without ``trained`` parameters one that only gathers."""
    import deepspeed

    options: dict[str, Any] = {}
    if trained is not None:
        options = {"optimizer": torch.optim.SGD(trained, LR), "model_parameters": trained}
    return deepspeed.initialize(model=model, config=configuration(stage), **options)[0]


def trained_parameters(model) -> dict[str, torch.Tensor]:
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p).clone() for name, p in model.named_parameters()}


def start() -> None:
    import deepspeed

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")


def shares() -> tuple[list, list]:
    """Two steps of two batches on each of two ranks: of both together, and of this one."""
    rows = examples(16)
    batches = [stack(rows[i : i + 2]) for i in range(0, 16, 2)]
    steps = [batches[:4], batches[4:]]
    return steps, [step[dist.get_rank() :: 2] for step in steps]


def check_loop() -> None:
    start()
    deepspeed_step = page("DeepSpeed")["deepspeed_step"]
    for stage in (2, 3):
        torch.manual_seed(0)
        student, teacher = Bigram(8), Bigram(12).requires_grad_(False)
        start_values, plain = parameters(student), Bigram(8)
        plain.load_state_dict(start_values)
        whole, mine = shares()
        for step in whole:
            plain_step(plain, teacher, step)
        constant = engine_of(teacher, stage) if stage == 3 else teacher
        engine = engine_of(student, stage, list(student.parameters()))
        assert (student.lm_head.weight.numel() == 0) == (stage == 3)
        for step in mine:
            deepspeed_step(engine, constant, step)
        assert_same_training(trained_parameters(student), parameters(plain), start_values)


class WithLoss(nn.Module):
    """What an engine wraps: a student whose forward computes the loss."""

    def __init__(self, student, teacher, **options: Any) -> None:
        super().__init__()
        self.student = student
        options |= {"temperature": TEMPERATURE, "ce_weight": CE_WEIGHT}
        self.loss_head = LinearKDHead(student.lm_head, teacher.lm_head, **options)

    def forward(self, ids, teacher_hidden, **tensors):
        return self.loss_head(self.student(ids), teacher_hidden, **tensors)


class Student(nn.Module):
    def __init__(self, hidden: int, *, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(41, hidden)
        self.layer = nn.Linear(hidden, hidden)
        self.lm_head = nn.Linear(hidden, 41, bias=not tied)
        if tied:
            self.lm_head.weight = self.embedding.weight

    def forward(self, ids):
        return self.layer(self.embedding(ids)).tanh()


def check_heads() -> None:
    """A step on halves of a batch, and one on the whole without DeepSpeed."""
    start()
    ids = torch.randint(41, (4, 10), generator=torch.Generator().manual_seed(0))
    mine = ids.chunk(2)[dist.get_rank()]
    for kind in ({}, {"tied": True}, {"reduction": "none"}, {"outside": True}):
        for stage in (2, 3):
            tied, outside = kind.get("tied", False), kind.get("outside", False)
            torch.manual_seed(0)
            student, teacher = Student(8, tied=tied), Student(12).requires_grad_(False)
            start_values, plain = parameters(student), Student(8, tied=tied)
            plain.load_state_dict(student.state_dict())
            hidden = teacher(ids)
            loss = WithLoss(plain, teacher)(ids[:, :-1], hidden[:, :-1], labels=ids[:, 1:])
            loss.backward()
            wanted = {name: p - LR * p.grad for name, p in plain.named_parameters()}

            if stage == 3:
                engine_of(teacher, stage)
            top = WithLoss(student, teacher, reduction=kind.get("reduction", "mean"))
            engine = engine_of(student if outside else top, stage, list(student.parameters()))
            if outside:
                top.student = engine
            # All of a step in one batch: the second, which closes it, weighs nothing.
            for weight in (2.0, 0.0):
                call = top if outside else engine
                loss = call(mine[:, :-1], teacher(mine)[:, :-1], labels=mine[:, 1:])
                engine.backward(weight * loss.mean())
                engine.step()
            assert_same_training(trained_parameters(student), wanted, start_values)
            if stage == 3:
                assert student.lm_head.weight.numel() == teacher.lm_head.weight.numel() == 0
                with pytest.raises(ValueError, match=r"shape \(0,\).*LinearKDHead"):
                    linear_kd_loss(hidden[..., :8], student.lm_head.weight, teacher_logits=hidden)


def with_an_engine(trainer_class):
    class WithEngine(trainer_class):
        def __init__(self, *args, teacher, **kwargs):
            teacher = engine_of(teacher.requires_grad_(False), 3)
            super().__init__(*args, teacher=teacher, **kwargs)

    return WithEngine


def check_trainer() -> None:
    """Trainer's part of the page, with a teacher that is an engine itself in ZeRO-3."""
    from transformers import TrainingArguments

    start()
    # Where use_cpu is set, accelerate knows DDP only.
    config = lambda **options: TrainingArguments(**options | {"use_cpu": False})  # noqa: E731
    for name in TRAINERS:
        for stage in (2, 3):
            trainer_class = page("Hugging Face Trainer")[name]
            if stage == 3:
                trainer_class = with_an_engine(trainer_class)
            settings = {"deepspeed": configuration(stage)}
            with tempfile.TemporaryDirectory() as directory:
                trainer, seen, _ = train(trainer_class, Path(directory), config, settings)
            assert type(trainer.model_wrapped).__name__ == "DeepSpeedEngine"
            assert (trainer.model.lm_head.weight.numel() == 0) == (stage == 3)
            both: list = [None, None]
            dist.all_gather_object(both, seen)
            student, teacher = llama(0, hidden=16), llama(1, hidden=24)
            start_values = parameters(student)
            halves = [[b for x in both for b in x[i : i + 2]] for i in (0, 2)]
            losses = [plain_step(student, teacher, half) for half in halves]
            assert logged(trainer) == pytest.approx(losses, rel=2e-5)
            actual = trained_parameters(trainer.model)
            assert_same_training(actual, parameters(student), start_values)
