"""The code of docs/trainers.md and its neighbours, run as it stands, against plain PyTorch and the
losses it replaces.

transformers, TRL and torchtune are no requirement of the tests: `benchmarks/requirements-peers.txt`
and its neighbour say how to install them. Other sections are in tests/test_trl.py, test_liger.py,
test_deepspeed.py, test_lightning.py, test_megatron.py and test_nemo.py.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmarks.peers import torchtune_losses
from kdkernels import SymmetricKL

from .documents import ROOT, blocks, defined, text_of
from .ranks import meeting

PAGES = "docs/trainers.md", "docs/replacing.md", "docs/megatron.md"
HUGGING_FACE = "transformers", "accelerate"
TRAINERS = "KDTrainer", "LinearKDTrainer"
VOCAB, LENGTH, LR = 41, 12, 0.5
TEMPERATURE, CE_WEIGHT = 2.0, 0.5  # as on the page

#: float32 throughout; parameters count by the way they went.
RTOL = 2e-5

pytestmark = pytest.mark.filterwarnings("ignore")  # of foreign packages, about each other


def page_of(heading: str) -> str:
    (page,) = (page for page in PAGES if f"\n## {heading}\n" in text_of(page))
    return page


def page(*headings: str) -> dict[str, Any]:
    """What the code of these sections defines, run in order in one namespace."""
    names: dict[str, Any] = {}
    for heading in headings:
        names = defined(page_of(heading), heading, **names)
    return names


def missing(*packages: str) -> list[str]:
    return [package for package in packages if importlib.util.find_spec(package) is None]


def need(*packages: str) -> None:
    if absent := missing(*packages):
        pytest.skip(f"{' and '.join(absent)} not installed")


def plain_loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The page's loss by the textbook, a sum over kept tokens."""
    student, teacher = student[:, :-1].flatten(0, 1), teacher[:, :-1].flatten(0, 1)
    labels = labels[:, 1:].flatten()
    log_q, log_p = (F.log_softmax(x / TEMPERATURE, dim=-1) for x in (student, teacher))
    divergence = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
    kd = TEMPERATURE**2 * divergence[labels != -100].sum()
    return kd + CE_WEIGHT * F.cross_entropy(student, labels, reduction="sum")


def plain_step(student, teacher, batches: list[dict[str, Tensor]]) -> float:
    """A step of SGD on the mean over all tokens of the batches, one sequence at a time."""
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        for ids, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            with torch.no_grad():
                logits = teacher(ids[None]).logits
            loss = plain_loss(student(ids[None]).logits, logits, labels[None]) / tokens
            loss.backward()
            total += float(loss)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter -= LR * parameter.grad
            parameter.grad = None
    return total


def examples(count: int) -> list[dict[str, Tensor]]:
    """Sequences whose prompts, of 0 to 7 tokens, are masked in the labels."""
    generator = torch.Generator().manual_seed(0)
    result = []
    for i in range(count):
        ids = torch.randint(VOCAB, (LENGTH,), generator=generator)
        labels = torch.where(torch.arange(LENGTH) < i % 8, -100, ids)
        result.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return result


def stack(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class Bigram(torch.nn.Module):
    """A language model without transformers: a token's logits come from it and the one before."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB, hidden)
        self.lm_head = torch.nn.Linear(hidden, VOCAB, bias=False)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        hidden = self.embedding(input_ids)
        return SimpleNamespace(logits=self.lm_head(hidden + F.pad(hidden, (0, 0, 1, -1))))


def llama(seed: int, hidden: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=LENGTH,
        initializer_range=0.3,  # distributions far from uniform
    )
    return LlamaForCausalLM(config)


def assert_same_training(actual, expected, start) -> None:
    """Parameters went where they should have, measured by the way they went."""
    for name, value in expected.items():
        way = (value - start[name]).abs().max()
        assert way > 1e-4, f"{name} has not been trained"
        error = (actual[name] - value).abs().max() / way
        assert error < RTOL, f"{name} is off by {float(error):.1e}"


def parameters(model) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def check_own_loop(rank: int = 0, ranks: int = 1) -> None:
    """Two steps of the page's loop on this rank's batches, and plain ones on all of them."""
    torch.manual_seed(0)
    student, teacher = Bigram(8), Bigram(12)
    start = parameters(student)
    rows = examples(8)
    batches = [stack(rows[i:j]) for i, j in ((0, 3), (3, 4), (4, 6), (6, 8))]
    steps = [batches, batches[::-1]]
    wrapped = student if ranks == 1 else torch.nn.parallel.DistributedDataParallel(student)
    train_step = page("Your own loop")["train_step"]
    for step in steps:
        optimizer = torch.optim.SGD(wrapped.parameters(), LR)
        train_step(wrapped, teacher, optimizer, step[rank::ranks])
    actual = parameters(student)
    student.load_state_dict(start)
    for step in steps:
        plain_step(student, teacher, step)
    assert_same_training(actual, parameters(student), start)
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_own_loop():
    check_own_loop()


def train(trainer_class, directory: Path, config=None, settings=(), **options):
    """Two steps of two batches each. Returns the trainer, its batches and the teacher."""
    if config is None:
        from transformers import TrainingArguments as config
    seen = []

    class Recorded(trainer_class):
        def compute_loss(self, model, inputs, *args, **kwargs):
            seen.append({name: inputs[name].clone() for name in ("input_ids", "labels")})
            return super().compute_loss(model, inputs, *args, **kwargs)

    arguments = config(
        output_dir=str(directory),
        use_cpu=True,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=2,
        optim="sgd",
        learning_rate=LR,
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **dict(settings),
    )
    teacher = llama(1, hidden=24)
    options = {"train_dataset": examples(16), "data_collator": stack} | options
    student, of_the_page = llama(0, hidden=16), hasattr(trainer_class, "distil")
    student.accepts_loss_kwargs = not of_the_page  # which must not depend on it
    options["teacher" if of_the_page else "teacher_model"] = teacher
    trainer = Recorded(student, args=arguments, **options)
    trainer.train()
    assert len(seen) == 4
    return trainer, seen, teacher


def logged(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def check(trainer, batches: list, teacher) -> None:
    """The trainer's losses and parameters are those of plain steps, half of the batches in each."""
    student = llama(0, hidden=16)
    start, half = parameters(student), len(batches) // 2
    losses = [plain_step(student, teacher, x) for x in (batches[:half], batches[half:])]
    assert logged(trainer) == pytest.approx(losses, rel=RTOL)
    assert_same_training(parameters(trainer.model), parameters(student), start)


@pytest.mark.parametrize("name", TRAINERS)
def test_hugging_face_trainer(name, tmp_path):
    need(*HUGGING_FACE)
    settings = {"per_device_eval_batch_size": 3, "prediction_loss_only": True}
    trainer_class = page("Hugging Face Trainer")[name]
    trainer, seen, teacher = train(trainer_class, tmp_path, settings=settings)
    check(trainer, seen, teacher)
    trained = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    assert trained == {id(p) for p in trainer.model.parameters()}
    assert all(p.grad is None for p in teacher.parameters())
    evaluated = trainer.evaluate(examples(3))["eval_loss"]
    assert evaluated == pytest.approx(
        plain_step(trainer.model, teacher, [stack(examples(3))]), RTOL
    )


def test_tokens_of_tensor_parallel_processes_count_once():
    need(*HUGGING_FACE)

    class Stub(page("Hugging Face Trainer")["KDTrainer"]):
        args = SimpleNamespace(average_tokens_across_devices=True)
        accelerator = SimpleNamespace(num_processes=4)

        def __init__(self):
            pass

        def get_tp_size(self):
            return 2

        def distil(self, model, inputs, labels, normalizer):
            return normalizer, None

    inputs = {"labels": torch.zeros(1, 3)}
    assert Stub().compute_loss(None, inputs, num_items_in_batch=torch.tensor(12)) == 6


def test_peft_teacher():
    need(*HUGGING_FACE, "peft")
    from peft import LoraConfig, get_peft_model

    options = LoraConfig(target_modules=["q_proj"], r=4, init_lora_weights=False)
    whole = get_peft_model(llama(1, hidden=24), options)
    inputs = {"input_ids": examples(1)[0]["input_ids"][None]}
    teacher = whole.get_base_model()  # as the page says
    logits = teacher.lm_head(teacher.base_model(**inputs).last_hidden_state)
    torch.testing.assert_close(logits, whole(**inputs).logits)
    with whole.disable_adapter():
        assert not torch.allclose(logits, whole(**inputs).logits)


def two_ranks(rank: int, trainers: list[str], directory: Path) -> None:
    """Of gloo, in processes that were forked before autograd ran."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    dist.init_process_group("gloo")
    check_own_loop(rank, 2)
    for name in trainers:
        trainer, seen, teacher = train(page("Hugging Face Trainer")[name], directory)
        assert trainer.accelerator.num_processes == 2
        both: list = [None, None]
        dist.all_gather_object(both, seen)
        check(trainer, [batch for i in (0, 2) for x in both for batch in x[i : i + 2]], teacher)
    dist.destroy_process_group()


RANKS = """
import multiprocessing, pathlib, sys
from tests.test_trainers import page, two_ranks
if sys.argv[2:]:
    page("Hugging Face Trainer")  # imported once for both
fork = multiprocessing.get_context("fork")
arguments = sys.argv[2:], pathlib.Path(sys.argv[1])
ranks = [fork.Process(target=two_ranks, args=(rank, *arguments)) for rank in (0, 1)]
for rank in ranks:
    rank.start()
for rank in ranks:
    rank.join()
sys.exit(any(rank.exitcode for rank in ranks))
"""


def test_two_ranks(tmp_path):
    """The own loop in DDP; where transformers is there, its Trainer too."""
    trainers = [] if missing(*HUGGING_FACE) else TRAINERS
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RANKS, str(tmp_path), *trainers],
        cwd=ROOT,
        env=os.environ | meeting(),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-3000:]


def logits_and_labels() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(3, 7, VOCAB, generator=generator) for _ in range(2))
    labels = torch.randint(VOCAB, (3, 7), generator=generator)
    return student, teacher, labels.masked_fill(torch.rand(3, 7, generator=generator) < 0.4, -100)


def assert_same_loss(ours, theirs, student: Tensor, *arguments, offset=0.0, **options) -> None:
    """The same gradient of both, and the same value but for an offset of theirs."""
    values, gradients = [], []
    for loss in (ours, theirs):
        leaf = student.clone().requires_grad_()
        values.append(loss(leaf * 1, *arguments, **options))
        gradients += torch.autograd.grad(values[-1], leaf)
    torch.testing.assert_close(values[0] + offset, values[1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


#: divergence, torchtune's name and argument, and how many of the teacher's entropies it is larger
TORCHTUNE = [
    ("forward_kl", "ForwardKL", (), 1),
    ("soft_cross_entropy", "ForwardKL", (), 0),
    ("reverse_kl", "ReverseKL", (), 0),
    (SymmetricKL(weight=0.3), "SymmetricKL", (0.3,), 0.3),
]


@pytest.mark.parametrize(("divergence", "name", "argument", "entropies"), TORCHTUNE, ids=str)
def test_torchtune_losses(divergence, name, argument, entropies):
    need("torchtune")
    losses = torchtune_losses()
    student, teacher, labels = logits_and_labels()
    log_p = teacher.log_softmax(-1)
    offsets = -entropies * (log_p.exp() * log_p).sum(-1)[labels != -100]
    ours = page("torchtune")["FusedKLLoss"](divergence, num_output_chunks=3)
    theirs = getattr(losses, name + "Loss")(*argument)
    flat = [x.flatten(0, 1) for x in (student, teacher, labels)]
    assert_same_loss(ours, theirs, *flat, offset=offsets.mean())
    assert_same_loss(ours, theirs, *flat, normalize=False, offset=offsets.sum())

    chunked = getattr(losses, name + "WithChunkedOutputLoss")(3, *argument)

    def by_chunks(loss):
        return lambda s, t, labels: loss(list(s.chunk(3, 1)), list(t.chunk(3, 1)), labels)

    both = by_chunks(ours), by_chunks(chunked)
    assert_same_loss(*both, student, teacher, labels, offset=offsets.mean())
    assert by_chunks(ours)(student, teacher, torch.full_like(labels, -100)) == 0


def test_every_section_with_code_is_run():
    tested = {"Your own loop", "Hugging Face Trainer", "torchtune"}
    # In files of their names:
    tested |= {"TRL", "Liger", "DeepSpeed", "Lightning", "NeMo AutoModel", "Megatron", "ModelOpt"}
    headings = {
        (page, heading)
        for page in PAGES
        for heading in re.findall(r"^## (.+)$", text_of(page), re.MULTILINE)
    }
    assert {heading for page, heading in headings if blocks(page, heading)} == tested
