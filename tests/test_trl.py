"""TRL's part of docs/trainers.md, run as it stands, against TRL's own losses.

TRL is no requirement of the tests: `benchmarks/requirements-peers.txt` says how to install it.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from .test_trainers import (
    HUGGING_FACE,
    RTOL,
    TRAINERS,
    VOCAB,
    assert_same_loss,
    assert_same_training,
    check,
    examples,
    llama,
    logged,
    logits_and_labels,
    need,
    page,
    parameters,
    train,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # of foreign packages, about each other


@pytest.fixture
def trl(monkeypatch):
    """TRL's part of the page, and what its trainers want beside models: nothing is tokenized."""
    need("trl", "datasets", *HUGGING_FACE)
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from datasets import Dataset
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), pad_token="w0", eos_token="w1"
    )
    rows = [{name: x.tolist() for name, x in row.items()} for row in examples(16)]
    dataset = Dataset.from_list(rows).with_format("torch")
    options = {"train_dataset": dataset, "processing_class": tokenizer}
    return SimpleNamespace(options=options, **page("Hugging Face Trainer", "TRL"))


@pytest.mark.parametrize("first", TRAINERS)
def test_trl_sft_trainer(trl, first, tmp_path):
    from trl import SFTConfig

    trainer_class = type("Combined", (getattr(trl, first), trl.SFTTrainer), {})
    assert trl.KDSFTTrainer.__bases__ == (trl.KDTrainer, trl.SFTTrainer)
    settings = {"bf16": False, "dataset_kwargs": {"skip_prepare_dataset": True}}
    check(*train(trainer_class, tmp_path, SFTConfig, settings, **trl.options))


def test_trl_gkd_trainer(trl, tmp_path):
    from trl.experimental.gkd import GKDConfig

    settings = {"bf16": False, "lmbda": 0.0, "beta": 0.3}
    ours, theirs = (
        train(trainer_class, tmp_path, GKDConfig, settings, **trl.options)[0]
        for trainer_class in (trl.FusedGKDTrainer, trl.GKDTrainer)
    )
    assert logged(ours) == pytest.approx(logged(theirs), rel=RTOL)
    start = parameters(llama(0, hidden=16))
    assert_same_training(parameters(ours.model), parameters(theirs.model), start)


@pytest.mark.parametrize("beta", [0, 0.3, 1])
def test_trl_loss(trl, beta):
    ours, theirs = (x.generalized_jsd_loss for x in (trl.FusedGKDTrainer, trl.GKDTrainer))
    student, teacher, labels = logits_and_labels()
    for options in (
        {"labels": labels},
        {"labels": labels, "temperature": 3.0},
        {"labels": labels, "num_items_in_batch": torch.tensor(17)},
        {"labels": labels, "num_items_in_batch": 17},
        {"labels": torch.full_like(labels, -100)},
    ):
        assert_same_loss(ours, theirs, student, teacher, beta=beta, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"beta": 0.0, "student_lm_head_bias": True, "teacher_lm_head_bias": True},
        {"beta": 0.3, "temperature": 2.0, "num_items_in_batch": torch.tensor(17)},
        {"beta": 1.0, "student_final_logit_softcapping": 3.0, "teacher_logit_scale": 0.5},
    ],
    ids=str,
)
def test_trl_distillation_loss(trl, options):
    from trl.trainer.distillation_trainer import _chunked_divergence_loss as theirs

    generator = torch.Generator().manual_seed(0)
    shapes = (3, 7, 16), (3, 7, 24), (VOCAB, 16), (VOCAB, 24)
    tensors = [torch.randn(shape, generator=generator) for shape in shapes]
    tensors.append((torch.rand(3, 7, generator=generator) < 0.6).long())
    bias = torch.randn(VOCAB, generator=generator)
    options = {name: bias if value is True else value for name, value in options.items()}
    results = []
    for loss in (theirs, trl.divergence_loss):
        leaves = [tensors[i].clone().requires_grad_() for i in (0, 2)]
        value, *sums = loss(leaves[0], tensors[1], leaves[1], *tensors[3:], **options)
        results.append((value, *sums, *torch.autograd.grad(value, leaves)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
