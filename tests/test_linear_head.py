"""Heads as modules: hooks, parametrizations, adapters, gathered weights."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import kdkernels
from kdkernels import LinearKDHead, LinearSparseKDHead, kd_loss, sparse_kd_loss

from .cases import normal
from .linear_cases import TEACHER_VOCAB, VOCAB, make_case, relative_error, some_labels
from .sparse_cases import top

LABELS = some_labels()
COMMON = {"temperature": 2.0, "ce_weight": 0.5}


def student_head(bias: bool = True) -> nn.Linear:
    case = make_case()
    head = nn.Linear(16, VOCAB, bias=bias)
    with torch.no_grad():
        head.weight.copy_(case.student_weight)
        if bias:
            head.bias.copy_(case.student_bias)
    return head


def teacher_head() -> nn.Linear:
    case = make_case()
    head = nn.Linear(24, TEACHER_VOCAB, bias=False).requires_grad_(False)
    head.weight.copy_(case.teacher_weight)
    return head


def fused_step(head: nn.Module, hidden):
    case = make_case()
    teacher = case.teacher_hidden, case.teacher_weight
    return LinearKDHead(head, **COMMON)(hidden, *teacher, labels=LABELS)


def dense_step(head: nn.Module, hidden):
    case = make_case()
    teacher = F.linear(case.teacher_hidden, case.teacher_weight)
    return kd_loss(head(hidden), teacher, labels=LABELS, backend="reference", **COMMON)


def entries():
    """Tokens and log-probabilities (..., 5) of a teacher."""
    case = make_case()
    teacher = F.linear(case.teacher_hidden, case.teacher_weight)[..., :VOCAB]
    return top(teacher / 2.0, 5)


def fused_sparse_step(head: nn.Module, hidden):
    return LinearSparseKDHead(head, **COMMON)(hidden, *entries(), labels=LABELS)


def dense_sparse_step(head: nn.Module, hidden):
    return sparse_kd_loss(head(hidden), *entries(), labels=LABELS, backend="reference", **COMMON)


STEPS = ((fused_step, dense_step), (fused_sparse_step, dense_sparse_step))


def gradients(step, head: nn.Module) -> list[torch.Tensor]:
    hidden = make_case().student_hidden.clone().requires_grad_()
    step(head, hidden).backward()
    named = [hidden, *(p for p in head.parameters() if p.requires_grad)]
    return [x.grad for x in named]


def assert_same(make_head) -> None:
    """Both modules give the gradients of the logits that the head gives."""
    for fused, dense in STEPS:
        torch.manual_seed(0)
        actual = gradients(fused, make_head())
        torch.manual_seed(0)
        expected = gradients(dense, make_head())
        for a, b in zip(actual, expected, strict=True):
            assert relative_error(a, b) < 5e-6


@pytest.mark.parametrize("bias", [False, True])
def test_plain_heads(bias):
    assert_same(lambda: student_head(bias))


def test_parametrized_heads():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    def doubled():
        head = student_head()
        parametrize.register_parametrization(head, "weight", Doubled())
        return head

    assert_same(doubled)
    assert_same(lambda: parametrizations.weight_norm(student_head()))
    assert_same(lambda: parametrizations.spectral_norm(student_head()).eval())


@pytest.mark.parametrize("step", [fused_step, fused_sparse_step])
def test_hooks_see_a_module_call(step):
    head, seen = student_head(), []
    head.register_forward_pre_hook(lambda module, args: seen.append(("pre", args[0].shape)))
    head.register_forward_hook(lambda module, args, out: seen.append(("post", out.shape)))
    head.register_full_backward_hook(lambda module, grads, out: seen.append(("backward", None)))
    gradients(step, head)
    assert seen == [("pre", (3, 7, 16)), ("post", ()), ("backward", None)]
    assert "forward" not in vars(head)
    assert head(normal(2, 16)).shape == (2, VOCAB)  # the head is a head again


def test_the_input_that_a_hook_returns_is_used():
    def with_hook():
        head = student_head()
        head.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
        return head

    assert_same(with_hook)


def test_the_head_survives_an_error():
    head = student_head()
    head.register_forward_pre_hook(lambda module, args: None)
    with pytest.raises(ValueError, match="temperature"):
        LinearKDHead(head, temperature=0)(
            make_case().student_hidden, make_case().teacher_hidden, make_case().teacher_weight
        )
    assert head(normal(2, 16)).shape == (2, VOCAB)


class GatheredLinear:
    """Hooks that hold a weight's memory for the duration of a call, as ZeRO-3 does."""

    def __init__(self, head: nn.Linear):
        self.full = {name: p.data for name, p in head.named_parameters()}
        self.calls = 0
        self.release(head)
        head.register_forward_pre_hook(lambda module, args: self.gather(module))
        head.register_forward_hook(lambda module, args, out: self.release(module))

    def gather(self, head):
        self.calls += 1
        for name, p in head.named_parameters():
            p.data = self.full[name]

    def release(self, head):
        for p in head.parameters():
            p.data = torch.empty(0)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_weights_gathered_by_hooks(reduction):
    expected = gradients(fused_step, student_head())[1:]
    head, teacher, case = student_head(), teacher_head(), make_case()
    gathered, gathered_teacher = GatheredLinear(head), GatheredLinear(teacher)
    module = LinearKDHead(head, teacher, temperature=2.0, ce_weight=0.5, reduction=reduction)
    loss = module(case.student_hidden, case.teacher_hidden, labels=LABELS)
    assert (gathered.calls, gathered_teacher.calls) == (1, 1)
    assert head.weight.numel() == teacher.weight.numel() == 0
    gathered.gather(head)  # as in a backward
    loss = loss if reduction == "mean" else loss.sum() / (LABELS != -100).sum()
    loss.backward()
    for p, wanted in zip(head.parameters(), expected, strict=True):
        assert relative_error(p.grad, wanted) < 1e-6


def test_a_weight_gathered_again_for_the_backward():
    expected = gradients(fused_sparse_step, student_head())[1:]
    head = student_head()
    gathered = GatheredLinear(head)
    loss = fused_sparse_step(head, make_case().student_hidden)
    assert head.weight.numel() == 0
    gathered.gather(head)  # as before the backward of a layer
    loss.backward()
    for p, wanted in zip(head.parameters(), expected, strict=True):
        assert relative_error(p.grad, wanted) < 1e-6


def test_memory_released_before_the_backward():
    """As FSDP2 does with a teacher's weight, which a loss per token would read again."""
    teacher, case = teacher_head(), make_case()
    weight = teacher.weight.detach()
    loss = kdkernels.linear_kd_loss(
        case.student_hidden.clone().requires_grad_(),
        case.student_weight,
        case.teacher_hidden,
        weight,
        reduction="none",
    )
    weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"released.*reduction=.none. reads.*token_weight"):
        loss.sum().backward()


def test_a_weight_that_is_not_there_says_so():
    head = student_head()
    GatheredLinear(head)
    case = make_case()
    with pytest.raises(ValueError, match=r"student_weight has shape \(0,\).*LinearKDHead"):
        kdkernels.linear_kd_loss(
            case.student_hidden, head.weight, case.teacher_hidden, case.teacher_weight
        )


class LoRA(nn.Module):
    """The attributes of a PEFT LoRA layer."""

    def __init__(self, base_layer: nn.Linear, rank: int = 4, dropout: float = 0.0):
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.lora_A, self.lora_B = nn.ModuleDict(), nn.ModuleDict()
        self.lora_dropout, self.scaling = nn.ModuleDict(), {}
        self.active_adapters, self.disable_adapters, self.merged = ["default"], False, False
        self.use_dora = {"default": False}
        for name, scale in (("default", 2.0), ("idle", 3.0)):
            self.lora_A[name] = nn.Linear(base_layer.in_features, rank, bias=False)
            self.lora_B[name] = nn.Linear(rank, base_layer.out_features, bias=False)
            self.lora_dropout[name], self.scaling[name] = nn.Dropout(dropout), scale
        self.lora_A["idle"].requires_grad_(False)
        self.lora_B["idle"].requires_grad_(False)

    def forward(self, x):
        result = self.base_layer(x)
        if not self.disable_adapters and not self.merged:
            for name in self.active_adapters:
                result += (
                    self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x)))
                    * (self.scaling[name])
                )
        return result


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_lora(dropout):
    assert_same(lambda: LoRA(student_head(), dropout=dropout))


def test_lora_with_hooks_and_both_adapters():
    calls = []

    def make():
        head = LoRA(student_head())
        head.active_adapters = ["default", "idle"]
        for layer in (head, head.base_layer, head.lora_A["default"], head.lora_B["default"]):
            layer.register_forward_pre_hook(lambda module, args: calls.append(type(module)))
        return head

    assert_same(make)
    assert calls[:4] == [LoRA, nn.Linear, nn.Linear, nn.Linear]
    assert len(calls) == 8 * len(STEPS)


def test_disabled_and_merged_adapters():
    for name in ("disable_adapters", "merged"):
        head = LoRA(student_head())
        setattr(head, name, True)
        hidden = make_case().student_hidden.clone().requires_grad_()
        for fused, dense in STEPS:
            assert torch.allclose(fused(head, hidden), dense(head, hidden))


def test_what_it_refuses():
    class Scaled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    dora, biased, other = (LoRA(student_head()) for _ in range(3))
    dora.use_dora["default"] = True
    biased.lora_B["default"] = nn.Linear(4, VOCAB)
    patched = student_head()
    patched.forward = lambda x: x
    del other.lora_A
    hidden = make_case().student_hidden
    with pytest.raises(TypeError, match=r"lm_head is a .*\.LoRA, .*an nn\.Linear or a LoRA layer"):
        LinearKDHead(other)
    for head in (
        Scaled(16, VOCAB),
        nn.Embedding(VOCAB, 16),
        patched,
        nn.Sequential(student_head()),
    ):
        with pytest.raises(TypeError, match=r"lm_head is a .* whose forward is not"):
            LinearKDHead(head)
    for head in (None, torch.zeros(VOCAB, 16), nn.Linear):
        with pytest.raises(TypeError, match=r"lm_head is a .*, expected an nn\.Linear or a model"):
            LinearKDHead(head)
    with pytest.raises(TypeError, match=r"lm_head\.weight has no shape yet"):
        LinearKDHead(nn.LazyLinear(VOCAB))
    with pytest.raises(TypeError, match=r"adapter 'default' is a variant of LoRA"):
        fused_step(dora, hidden)
    with pytest.raises(TypeError, match="adapter 'default' has a bias"):
        fused_step(biased, hidden)
    for module in (LinearKDHead, LinearSparseKDHead):
        with pytest.raises(TypeError, match="temprature"):
            module(student_head(), temprature=2.0)
    quantized = student_head()
    del quantized.weight
    quantized.weight = torch.zeros(VOCAB, 8, dtype=torch.uint8)
    with pytest.raises(TypeError, match=r"student_weight is torch.uint8"):
        fused_step(quantized, hidden)


def test_module_state():
    head = LinearKDHead(student_head(), teacher_head(), temperature=2.0)
    assert list(head.state_dict()) == ["lm_head.weight", "lm_head.bias"]
    assert "temperature=2.0" in repr(head)
    assert list(LinearSparseKDHead(student_head()).state_dict()) == list(head.state_dict())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("loss", [LinearKDHead, LinearSparseKDHead])
def test_compiles_into_one_graph(loss):
    case, head = make_case(), student_head()
    teacher = case.teacher_hidden, case.teacher_weight
    if loss is LinearSparseKDHead:
        teacher = entries()
    module = loss(head, temperature=2.0)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    compiled(case.student_hidden, *teacher).backward()
    actual = head.weight.grad
    head.weight.grad = None
    module(case.student_hidden, *teacher).backward()
    torch.testing.assert_close(actual, head.weight.grad)
