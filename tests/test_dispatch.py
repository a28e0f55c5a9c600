"""Where plain tensors go straight to a kernel, whoever watches operators still sees them."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from kdkernels import backends, kd_loss, linear_kd_loss, ops, sparse_kd_loss, watchers

from .cases import correlated_pair, labels_for, normal
from .harness import Operators, default_dtype, loss_of

FORWARD = torch.ops.kdkernels.logits_loss_and_grad.default
IN_PLACE = torch.ops.kdkernels.logits_loss_and_grad_.default
BACKWARD = torch.ops.kdkernels.scale_gradient_.default
VOCAB = 37


def pair(rows=3):
    student, teacher = correlated_pair(rows, VOCAB)
    return student.requires_grad_(), teacher


def step(student, teacher, **options):
    return torch.autograd.grad(kd_loss(student, teacher, **options), student)[0]


class FunctionMode(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.seen.append(function)
        return function(*args, **(kwargs or {}))


class Wrapper(torch.Tensor):
    """A tensor that is another one, and counts the operators it meets."""

    seen: list = []  # noqa: RUF012
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), dtype=inner.dtype, device=inner.device
        )

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        cls.seen.append(function)
        plain = torch.utils._pytree.tree_map_only(Wrapper, lambda x: x.inner, args)
        return function(*plain, **(kwargs or {}))


def test_plain_tensors_go_straight(monkeypatch):
    def dispatched(*_):
        raise AssertionError("dispatched")

    student, teacher = pair()
    expected = step(student, teacher)
    names = ("logits_loss", "logits_loss_and_grad", "logits_loss_and_grad_", "scale_gradient_")
    for name in names:
        monkeypatch.setattr(getattr(ops._ops, name), "default", dispatched)
    assert torch.equal(step(student, teacher), expected)
    assert step(1 * student.detach().requires_grad_(), teacher).shape == student.shape
    assert kd_loss(student.detach(), teacher) == kd_loss(student, teacher)
    for leaf in (student, student.detach()):
        with pytest.raises(AssertionError, match="dispatched"), Operators():
            kd_loss(leaf, teacher)


def test_dispatch_modes_see_operators():
    student, teacher = pair()
    expected = step(student, teacher)
    with Operators() as mode:
        actual = step(student, teacher)
    assert FORWARD in mode.seen
    assert BACKWARD in mode.seen
    assert torch.equal(actual, expected)
    with Operators() as mode:
        step(student * 1, teacher, inplace_grad=True)
    assert IN_PLACE in mode.seen


def test_a_mode_that_only_the_backward_runs_under():
    student, teacher = pair()
    loss = kd_loss(student, teacher)
    with Operators() as mode:
        loss.backward()
    assert BACKWARD in mode.seen


def test_function_modes_see_operators():
    with FunctionMode() as mode:
        step(*pair())
    assert FORWARD in mode.seen


def test_fake_tensors_are_never_read():
    with FakeTensorMode() as mode:
        student, teacher = torch.randn(3, VOCAB, requires_grad=True), torch.randn(3, VOCAB)
        gradient = step(student, teacher)
    assert isinstance(gradient, torch._subclasses.FakeTensor)
    fake = mode.from_tensor(pair()[1])
    assert not watchers.goes_straight(fake)


def test_fake_tensors_are_not_looked_at():
    """Checks of values would read them: labels, listed tokens and their probabilities."""
    teacher = pair()[1]
    logprobs, indices = teacher.log_softmax(-1).topk(5)
    labels = indices[:, 0]
    with FakeTensorMode() as mode:
        student, *others = map(mode.from_tensor, (pair()[0], teacher, logprobs, indices, labels))
        teacher, logprobs, indices, labels = others
        options = {"labels": labels, "ce_weight": 0.5}
        for loss in (
            kd_loss(student, teacher, backend="reference", **options),
            sparse_kd_loss(student, indices, logprobs, **options),
            linear_kd_loss(student, torch.randn(8, VOCAB), teacher_logits=teacher[:, :8]),
        ):
            assert torch.autograd.grad(loss, student)[0].shape == (3, VOCAB)


@pytest.mark.parametrize("tracing_mode", ["real", "fake", "symbolic"])
def test_traces_hold_operators(tracing_mode):
    graph = make_fx(lambda s, t: step(s, t), tracing_mode=tracing_mode)(*pair())
    called = {node.target for node in graph.graph.nodes}
    assert {FORWARD, BACKWARD} <= called


def test_exported_programs_hold_operators():
    class Loss(torch.nn.Module):
        def forward(self, student, teacher):
            return kd_loss(student, teacher)

    program = torch.export.export(Loss(), pair())
    assert any("kdkernels" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("which", [0, 1])
def test_subclasses_see_operators(which):
    student, teacher = pair()
    expected = step(student, teacher)
    arguments = [student.detach(), teacher]
    arguments[which] = Wrapper(arguments[which])
    arguments[0].requires_grad_()
    Wrapper.seen.clear()
    loss = kd_loss(*arguments)
    assert FORWARD in Wrapper.seen
    if which == 1:
        loss.backward()
        assert torch.equal(arguments[0].grad, expected)


def test_profiles_show_operators():
    student, teacher = pair()
    with torch.profiler.profile() as profile:
        step(student, teacher)
    names = {event.key for event in profile.key_averages()}
    assert {"kdkernels::logits_loss_and_grad", "kdkernels::scale_gradient_"} <= names


@pytest.mark.parametrize("which", ["student", "teacher", "token_weight", "grad_output"])
def test_lazily_negated_tensors(which):
    """A negation that torch has only noted down is not in memory, where kernels read."""
    student, teacher = correlated_pair(1, VOCAB)
    tensors = {"student": student, "teacher": teacher}
    tensors |= {"token_weight": torch.tensor([0.5]), "grad_output": torch.tensor([2.0])}

    def gradient(tensors):
        leaf = tensors["student"].requires_grad_()
        weight = tensors["token_weight"]
        loss = kd_loss(leaf, tensors["teacher"], token_weight=weight, reduction="none")
        return torch.autograd.grad(loss, leaf, tensors["grad_output"])[0]

    lazy = tensors | {which: torch._neg_view(-tensors[which])}
    assert lazy[which].is_neg()
    assert torch.equal(gradient(lazy), gradient(tensors))


def test_vmap_of_the_loss():
    student, teacher = correlated_pair(4, 3, VOCAB)
    losses = torch.func.vmap(kd_loss)(student, teacher)
    expected = torch.stack([kd_loss(s, t) for s, t in zip(student, teacher, strict=True)])
    assert torch.equal(losses, expected)


def test_vmap_of_the_loss_loses_no_gradient():
    """What vmap wraps says that it requires none."""
    student, teacher = correlated_pair(4, 3, VOCAB)
    leaf = student.requires_grad_()
    with pytest.raises(RuntimeError, match=r"kd_loss: torch.func.*reference"):
        torch.func.vmap(kd_loss)(leaf, teacher)
    with torch.no_grad():
        assert torch.func.vmap(kd_loss)(leaf, teacher).shape == (4,)
    loss = torch.func.vmap(lambda s, t: kd_loss(s, t, backend="reference"))(leaf, teacher)
    loss.sum().backward()
    assert (leaf.grad.norm(dim=(1, 2)) > 0).all()


def test_the_reference_can_be_transformed():
    student, teacher = correlated_pair(4, 3, VOCAB)
    logprobs, indices = teacher.log_softmax(-1).topk(5)
    labels = labels_for(4, 3, vocab=VOCAB)

    def dense(s, t, labels):
        return kd_loss(s, t, labels=labels, ce_weight=0.5, backend="reference")

    def sparse(s, indices, logprobs):
        return sparse_kd_loss(s, indices, logprobs, backend="reference")

    for loss, *others in ((dense, teacher, labels), (sparse, indices, logprobs)):
        actual = torch.func.vmap(torch.func.grad(loss))(student, *others)
        for i in range(len(student)):
            expected = torch.func.grad(loss)(student[i], *(x[i] for x in others))
            torch.testing.assert_close(actual[i], expected)


def test_kernels_say_what_cannot_be_transformed():
    student, teacher = correlated_pair(4, VOCAB)
    logprobs, indices = teacher.log_softmax(-1).topk(5)
    with pytest.raises(RuntimeError, match=r"sparse_kd_loss: torch.func.*reference"):
        torch.func.vmap(sparse_kd_loss)(student, indices, logprobs)
    hidden, head = normal(4, 8), normal(VOCAB, 8).requires_grad_()
    with pytest.raises(RuntimeError, match=r"linear_kd_loss: torch.func.*reference"):
        torch.func.vmap(lambda x: linear_kd_loss(x, head.detach(), x, head.detach()))(hidden)
    leaf = student.requires_grad_()
    per_token = {"kd_loss": (kd_loss(leaf, teacher, reduction="none"), leaf)}
    loss = linear_kd_loss(hidden, head, hidden, head.detach(), reduction="none")
    per_token["linear_kd_loss"] = loss, head
    for name, (loss, of) in per_token.items():
        with pytest.raises(RuntimeError, match=f"^{name}: .*is_grads_batched.*reference"):
            torch.autograd.grad(loss, of, torch.eye(4), is_grads_batched=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_is_not_that_of_results(kernel, dtype):
    student, teacher = pair()
    options = {"reduction": "none", "return_metrics": True}
    expected, metrics = loss_of(kernel, student, teacher, **options)
    with default_dtype(dtype):
        actual, actual_metrics = loss_of(kernel, student, teacher, **options)
    assert torch.equal(actual, expected)
    assert torch.equal(actual_metrics["divergence"], metrics["divergence"])


def test_arguments_are_checked_each_time():
    student, teacher = pair()
    kd_loss(student, teacher, temperature=1)
    with pytest.raises(TypeError, match="temperature is a bool"):
        kd_loss(student, teacher, temperature=True)
    with pytest.raises(TypeError, match="temperature is a list") as caught:
        kd_loss(student, teacher, temperature=[1.0])
    assert caught.value.__context__ is None
    kd_loss(student, teacher, ignore_index=1)
    with pytest.raises(TypeError, match="ignore_index is a float"):
        kd_loss(student, teacher, ignore_index=1.0)


@pytest.mark.parametrize("student_dtype", [torch.float32, torch.float16], ids=str)
def test_the_default_dtype_is_not_that_of_linear_results(student_dtype):
    hidden = correlated_pair(6, 8)[0].to(student_dtype)
    weight, teacher = correlated_pair(VOCAB, 8)[0].to(student_dtype), correlated_pair(6, VOCAB)[1]
    bias = correlated_pair(1, VOCAB)[0][0].to(student_dtype)

    def results():
        leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
        loss, metrics = linear_kd_loss(
            leaves[0],
            leaves[1],
            teacher_logits=teacher,
            student_bias=leaves[2],
            chunk_bytes=4 * VOCAB * 8,
            return_metrics=True,
        )
        return loss, metrics["divergence"], *torch.autograd.grad(loss, leaves)

    expected = results()
    with default_dtype(torch.bfloat16):
        actual = results()
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def test_plain_tensors_need_no_dispatching(kernel):
    student, teacher = (x.to(kernel.device) for x in pair())
    assert watchers.goes_straight(student, teacher, None)
    assert watchers.goes_straight(student.requires_grad_())


def test_compiled_kernels_need_no_operators_beside_them(monkeypatch, kernel):
    """Neither for weights nor for what losses come to: on a GPU each would be a launch."""
    if kernel.backend == "triton":
        pytest.skip("what Triton's kernels need once a call comes from PyTorch")
    implementation, seen = backends.IMPLEMENTATIONS[kernel.backend], set()
    logits_loss = implementation.logits_loss

    def watched(*arguments):
        with Operators() as operators:
            results = logits_loss(*arguments)
        seen.update(function.overloadpacket.__name__ for function in operators.seen)
        return results

    monkeypatch.setattr(implementation, "logits_loss", watched)
    student, teacher = pair()
    options = {"labels": labels_for(3, vocab=VOCAB), "ce_weight": 0.5}
    options["token_weight"] = torch.rand(3)
    for reduction in ("mean", "sum", "none"):
        loss_of(kernel, student, teacher, reduction=reduction, return_metrics=True, **options)
    poisoning = {"fill_", "detach"}  # of new memory, in these tests
    assert seen - poisoning <= {"empty", "empty_strided"}


def test_without_torchs_private_names_every_call_is_dispatched(monkeypatch):
    student, teacher = pair()
    assert watchers.goes_straight(student, teacher, None)
    monkeypatch.setattr(watchers, "_THREAD_KEYS", 0)
    assert not watchers.goes_straight(student, teacher, None)


def test_imported_while_tensors_are_fake():
    script = """
import torch
from torch._subclasses import FakeTensorMode
with FakeTensorMode():
    import kdkernels
s, t = torch.randn(2, 8, requires_grad=True), torch.randn(2, 8)
got, expected = (kdkernels.kd_loss(s, t, backend=name) for name in ("cpu", "reference"))
torch.testing.assert_close(got, expected)
got.backward()
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
