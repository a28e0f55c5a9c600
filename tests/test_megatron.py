"""Megatron and ModelOpt, where they are installed: docs/megatron.md, in two processes.

tests/requirements-frameworks.txt says how to install them. Without a GPU Megatron needs to be told
that its device is the CPU, and its random numbers have to be those of inference.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from .ranks import run_two
from .test_trainers import CE_WEIGHT, TEMPERATURE, need, page

VOCAB, LENGTH, BATCH = 61, 8, 2

#: A padded vocabulary of 256 is shards of 128, of which the second is padding alone.
KINDS: list[dict[str, Any]] = [
    {"padded": 64},
    {"padded": 256},
    {"padded": 64, "per_token": True},
    {"padded": 64, "tied": True},
    {"padded": 64, "sequence_parallel": True},
    {"padded": 64, "bf16": True},
]


def test_recipes_in_two_ranks():
    need("megatron")
    run_two("test_megatron", "check_recipes")


def test_modelopt_in_two_ranks():
    need("megatron", "modelopt", "requests")
    run_two("test_megatron", "check_modelopt")


def start() -> None:
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    dist.init_process_group("gloo")
    torch.cuda.current_device = lambda: torch.device("cpu")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    initialize_rng_tracker(inference_rng_tracker=True)


def gpt(
    seed: int, hidden: int, padded: int, sequence_parallel=False, tied=False, bf16=False, **kind
):
    """A GPTModel of one layer, as Megatron's training makes it; of logits far from uniform."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.module import Float16Module
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
    from megatron.core.transformer.transformer_config import TransformerConfig

    torch.manual_seed(seed)
    config = TransformerConfig(
        num_layers=1,
        hidden_size=hidden,
        num_attention_heads=4,
        tensor_model_parallel_size=2,
        sequence_parallel=sequence_parallel,
        use_cpu_initialization=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=0.3,
        bf16=bf16,
        calculate_per_token_loss=kind.get("per_token", False),
    )
    spec: Any = get_gpt_layer_local_spec()
    if sequence_parallel:  # whose norms need Apex or Transformer Engine
        spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = IdentityOp
        spec = TransformerBlockSubmodules(layer_specs=[spec], layer_norm=None)
    options = {"max_sequence_length": LENGTH, "share_embeddings_and_output_weights": tied}
    model = GPTModel(config, spec, vocab_size=padded, **options)
    return Float16Module(config, model) if bf16 else model


def batches():
    """Two, of different numbers of tokens."""
    generator = torch.Generator().manual_seed(1)
    for share in (0.7, 0.4):
        ids = torch.randint(VOCAB, (BATCH, LENGTH + 1), generator=generator)
        yield {
            "input_ids": ids[:, :-1],
            "position_ids": torch.arange(LENGTH).expand(BATCH, -1),
            "attention_mask": torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1),
            "labels": ids[:, 1:],
            "loss_mask": (torch.rand(BATCH, LENGTH, generator=generator) < share).float(),
        }


def gradients(model) -> dict[str, torch.Tensor]:
    """Which the model then has no more."""
    result = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return result


def whole(shard: torch.Tensor) -> torch.Tensor:
    shards = [torch.empty_like(shard) for _ in range(2)]
    dist.all_gather(shards, shard.detach().contiguous())
    return torch.cat(shards, -1).double()


def expected(model, teacher, *, per_token: bool):
    """By the textbook in float64, on logits gathered from both ranks; the gradient of its shard."""
    losses = []
    for batch in batches():
        labels, mask = batch.pop("labels"), batch.pop("loss_mask").double()
        logits, constant = model(**batch), whole(teacher(**batch))[..., :VOCAB]
        leaf = whole(logits).requires_grad_()
        valid = leaf[..., :VOCAB]
        log_q, log_p = ((x / TEMPERATURE).log_softmax(-1) for x in (valid, constant))
        divergence = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
        hard = F.cross_entropy(valid.flatten(0, 1), labels.flatten(), reduction="none")
        per_row = TEMPERATURE**2 * divergence + CE_WEIGHT * hard.view_as(labels)
        loss = (per_row * mask).sum()
        loss = loss if per_token else loss / mask.sum() / 2  # Megatron's mean of two batches
        loss.backward()
        logits.backward(leaf.grad.chunk(2, -1)[dist.get_rank()].to(logits.dtype))
        losses.append(loss.item())
    return losses, gradients(model)


def steps(model, forward_step):
    """What Megatron's schedule without pipelines does, which allocates on CUDA beside it."""
    from megatron.core.pipeline_parallel import schedules

    iterator, reports, losses = batches(), [], []
    for i in range(2):
        options = {"cp_group_size": 1, "is_last_stage": True, "current_microbatch": i}
        loss, _ = schedules.forward_step(
            forward_step, iterator, model, 2, None, reports, model.config, **options
        )
        losses.append(loss.item())
        schedules.backward_step(None, loss, None, None, model.config)
    return losses, gradients(model), reports


def assert_same_gradients(actual, wanted, rtol: float = 2e-6) -> None:
    assert actual.keys() == wanted.keys()
    assert len(actual) > 5
    for name, value in wanted.items():
        error = (actual[name].float() - value.float()).norm() / value.float().norm().clamp_min(1e-9)
        assert error < rtol, f"{name} is off by {float(error):.1e}"


def check_recipe(name: str, kind: dict[str, Any]) -> None:
    model, teacher = gpt(0, 16, **kind), gpt(1, 32, **kind)
    step = functools.partial(page("Megatron")[name], teacher=teacher, vocab_size=VOCAB)
    losses, grads, reports = steps(model, step)
    wanted_losses, wanted = expected(model, teacher, per_token=kind.get("per_token", False))
    assert losses == pytest.approx(wanted_losses, rel=1e-6)
    # bfloat16's rounding of gradients hides what is smaller.
    assert_same_gradients(grads, wanted, 2e-2 if kind.get("bf16") else 2e-6)
    for report, batch in zip(reports, batches(), strict=True):
        assert report["kd loss"][1] == batch["loss_mask"].sum()


def check_recipes() -> None:
    start()
    for kind in KINDS:
        check_recipe("forward_step", kind)
        if not kind.get("bf16"):
            check_recipe("linear_forward_step", kind)


def check_modelopt() -> None:
    start()
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss

    ours = page("ModelOpt")["FusedLogitsKLLoss"]
    for kind in ({"padded": 64}, {"padded": 64, "sequence_parallel": True}):
        for skip_lm_loss, reverse in ((True, False), (True, True), (False, False)):
            options = {"skip_lm_loss": skip_lm_loss, "reverse": reverse, **kind}
            actual, wanted = (distil(loss, **options) for loss in (ours, LogitsKLLoss))
            assert actual[0] == pytest.approx(wanted[0], rel=2e-6)
            assert_same_gradients(actual[1], wanted[1])


def distil(loss_class, *, skip_lm_loss: bool, reverse: bool, **kind):
    """Losses and gradients of two batches through ModelOpt's plugin."""
    import modelopt.torch.distill as mtd
    from megatron.core import parallel_state
    from modelopt.torch.distill.plugins import megatron as plugin

    student, teacher = gpt(0, 16, **kind), gpt(1, 32, **kind)
    criterion = loss_class(student.config, temperature=TEMPERATURE, reverse=reverse)
    config = plugin.DistillationConfig(
        skip_lm_loss=skip_lm_loss, criterion={("output_layer", "output_layer"): criterion}
    )
    config = plugin.setup_distillation_config(config, student.config, teacher.config)
    mode = {"teacher_model": teacher, "criterion": config.criterion}
    mode["loss_balancer"] = config.loss_balancer
    model = mtd.convert(student, mode=[("kd_loss", mode)])
    plugin.adjust_distillation_model_for_mcore(model, config)
    model.train()
    losses = []
    for batch in batches():
        mask = batch.pop("loss_mask")

        def masked(loss, mask=mask):
            """As Megatron-LM does with what the plugin's losses return."""
            per_token, tensor_parallel, _ = loss
            total = (per_token.flatten() * mask.flatten()).sum()
            if tensor_parallel:
                dist.all_reduce(total, group=parallel_state.get_tensor_model_parallel_group())
            return total

        lm_loss = masked((model(**batch), False, False))
        found = model.compute_kd_loss(student_loss=lm_loss, loss_reduction_fn=masked)
        found["kd_loss"].backward()
        losses += [found["kd_loss"].item(), found["logits_loss"].item()]
    return losses, gradients(model)
