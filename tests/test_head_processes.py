"""Heads of a model that DDP copies or FSDP2 shards: halves of a batch on two ranks."""

from __future__ import annotations

import gc
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

from kdkernels import LinearKDHead, LinearSparseKDHead

from .documents import defined
from .ranks import run_two

VOCAB, ROWS, K = 37, 6, 5


@pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()), reason="torch has no gloo"
)
@pytest.mark.parametrize("check", ["dense", "sparse", "documented"])
def test_two_processes(check):
    run_two("test_head_processes", check)


@contextmanager
def gloo():
    """A group that is left after the models of a check are gone: they would keep its threads."""
    dist.init_process_group("gloo")
    yield
    gc.collect()
    dist.destroy_process_group()


class Model(nn.Module):
    def __init__(self, loss, *, head_of_its_own: bool = True):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(8, 16)
        lm_head = nn.Linear(16, VOCAB, bias=False)
        if head_of_its_own:
            self.lm_head = lm_head
        self.head = loss(lm_head, temperature=2.0)

    def forward(self, x, *teacher):
        return self.head(self.body(x), *teacher)


@gloo()
def dense():
    weight = torch.randn(VOCAB, 12, generator=torch.Generator().manual_seed(1))
    compare(LinearKDHead, (torch.randn(ROWS, 12),), (weight,))


@gloo()
def sparse():
    logprobs, indices = torch.randn(ROWS, VOCAB).log_softmax(-1).topk(K)
    compare(LinearSparseKDHead, (indices, logprobs), ())


class LM(nn.Module):
    """What a causal LM of Hugging Face's has."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = Decoder()
        self.lm_head = nn.Linear(16, VOCAB, bias=False)
        self.config = SimpleNamespace(hidden_size=16)

    def get_output_embeddings(self):
        return self.lm_head


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, 16)
        self.layers = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])

    def forward(self, ids):
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = x + layer(x).tanh()
        return SimpleNamespace(last_hidden_state=x)


@gloo()
def documented():
    """The student of docs/sparse.md."""
    names = defined("docs/sparse.md", "A head that FSDP2 shards")
    ids = torch.randint(VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))
    logprobs, indices = torch.randn(2, 7, VOCAB).log_softmax(-1).topk(K)
    for tensor in (indices, logprobs):
        dist.broadcast(tensor, 0)
    options = {"temperature": 2.0, "ce_weight": 0.5}
    plain, model = names["Student"](LM(), **options), names["shard"](LM(), **options)
    sum_gradients(model)
    plain(ids, indices, logprobs, labels=ids[:, 1:]).backward()
    part = slice(dist.get_rank(), dist.get_rank() + 1)
    model(ids[part], indices[part], logprobs[part], labels=ids[part, 1:]).backward()
    assert_same_gradients(model, plain)


def compare(loss, per_row, common):
    """Gradients of halves, averaged over ranks, are those of the batch in one process."""
    from torch.distributed.device_mesh import init_device_mesh

    rank = dist.get_rank()
    torch.manual_seed(2)
    x = torch.randn(ROWS, 8)
    for tensor in (x, *per_row):
        dist.broadcast(tensor, 0)
    plain = Model(loss)
    plain(x, *per_row, *common).backward()
    part = slice(3 * rank, 3 * rank + 3)
    mesh = init_device_mesh("cpu", (2,))
    for wrap in WRAPPERS:
        model = wrap(loss, mesh)
        for _ in range(2):
            model.zero_grad()
            model(x[part], *(y[part] for y in per_row), *common).backward()
        assert_same_gradients(model, plain)


def assert_same_gradients(model, plain):
    for actual, expected in zip(model.parameters(), plain.parameters(), strict=True):
        gradient = actual.grad
        if hasattr(gradient, "full_tensor"):
            gradient = gradient.full_tensor()
        torch.testing.assert_close(gradient, expected.grad, rtol=1e-5, atol=1e-7)


def copied(loss, mesh):
    return nn.parallel.DistributedDataParallel(Model(loss))


def sharded_head(loss, mesh):
    model = Model(loss)
    return sharded(model, mesh, model.head.lm_head)


def sharded_module(loss, mesh):
    model = Model(loss, head_of_its_own=False)
    return sharded(model, mesh, model.head)


def sharded_model(loss, mesh):
    return sharded(Model(loss), mesh)


def sharded(model, mesh, *parts):
    from torch.distributed.fsdp import fully_shard

    for part in (*parts, model):
        fully_shard(part, mesh=mesh)
    sum_gradients(model)
    return model


def sum_gradients(model):
    """gloo has no mean of its own: some versions of torch take its sum for one without this."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)


WRAPPERS = (copied, sharded_head, sharded_module, sharded_model)
