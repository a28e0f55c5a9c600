"""Bad input of the fused-linear level: the right exception, naming what was got and expected."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kdkernels import linear_kd_loss

from .linear_cases import make_case
from .test_errors import OPTIONS

CASE = make_case(lead=(2, 3))
META = torch.zeros(2, 3, 24, device="meta")

ARGUMENTS = [
    # what differs from a good call, exception, the message
    ({"chunk_bytes": 2**80}, ValueError, "chunk_bytes is .*, expected an int of 64 bits"),
    ({"student_hidden": None}, TypeError, "student_hidden is a NoneType, expected a torch.Tensor"),
    (
        {"student_hidden": SimpleNamespace(last_hidden_state=CASE.student_hidden)},
        TypeError,
        r"student_hidden is a .*, expected a torch.Tensor: pass its \.last_hidden_state",
    ),
    (
        {"student_weight": torch.nn.Linear(16, 203)},
        TypeError,
        r"student_weight is a Linear, expected a torch.Tensor: pass its \.weight",
    ),
    ({"student_hidden": CASE.student_hidden.long()}, TypeError, "student_hidden is torch.int64"),
    ({"student_hidden": torch.tensor(1.0)}, ValueError, r"student_hidden has shape \(\), expected"),
    (
        {"student_hidden": CASE.student_hidden[..., :8]},
        ValueError,
        r"student_hidden has shape \(2, 3, 8\), expected a last dimension of 16, .*student_weight",
    ),
    (
        {"student_hidden": CASE.student_hidden.bfloat16()},
        TypeError,
        r"hidden is torch.bfloat16, expected .* student_weight, torch.float32: .*autocast",
    ),
    (
        {"student_hidden": CASE.student_hidden.to("meta")},
        ValueError,
        "student_hidden is on meta and student_weight on cpu, expected both on cpu",
    ),
    (
        {"student_hidden": [CASE.student_hidden] * 2},
        ValueError,
        r"has 1 tensors, expected as many as student_hidden, 2, .*hidden_states\[-1\]",
    ),
    ({"student_hidden": [], "student_weight": []}, ValueError, "expected .* at least one"),
    (
        {
            "student_hidden": [CASE.student_hidden] * 2,
            "student_weight": [CASE.student_weight, CASE.student_weight[:5]],
        },
        ValueError,
        r"of a later term .* \(5, 16\), expected .* \(2, 3\) and 203",
    ),
    (
        {"student_weight": torch.empty(0)},
        ValueError,
        r"student_weight has shape \(0,\), expected \(vocab, hidden\).*LinearKDHead",
    ),
    (
        {"student_weight": CASE.student_weight.to(torch.uint8)},
        TypeError,
        "student_weight is torch.uint8, expected float32",
    ),
    (
        {"student_bias": CASE.student_bias[1:]},
        ValueError,
        r"student_bias .*\(202,\), expected .203",
    ),
    (
        {"student_bias": CASE.student_bias.half()},
        TypeError,
        "student_bias is torch.float16, expect",
    ),
    ({"student_bias": 0.5}, TypeError, "student_bias is a float, expected a torch.Tensor"),
    (
        {"teacher_hidden": None},
        ValueError,
        "teacher_hidden or teacher_logits: neither is given, expected one of them",
    ),
    ({"teacher_logits": torch.zeros(2, 3, 9)}, ValueError, "both are given, expected one of them"),
    ({"teacher_weight": None}, ValueError, r"teacher_weight is None, .*vocab, .*teacher_logits="),
    (
        {"student_weight": CASE.student_weight[:0]},
        ValueError,
        r"student_weight .*a vocabulary of at least 1",
    ),
    (
        {"teacher_hidden": CASE.teacher_hidden[:1]},
        ValueError,
        r"teacher_hidden has shape \(1, 3, 24\), expected the leading shape .* \(2, 3\)",
    ),
    ({"teacher_hidden": META}, ValueError, "teacher_hidden is on meta, expected the student's dev"),
    (
        {"teacher_hidden": np.zeros((2, 3, 24), dtype=np.int64)},
        TypeError,
        "teacher_hidden is torch.int64, expected float32",
    ),
    (
        {"teacher_weight": CASE.teacher_weight.to("meta")},
        ValueError,
        "teacher_weight is on meta, expected the device of student_weight, cpu",
    ),
    (
        {"teacher_weight": CASE.teacher_weight.clone().requires_grad_()},
        ValueError,
        r"teacher_weight requires grad, expected a constant.*teacher_weight.detach\(\)",
    ),
    (
        {"teacher_hidden": CASE.teacher_hidden.clone().requires_grad_()},
        ValueError,
        "teacher_hidden requires grad, expected a constant",
    ),
    ({"chunk_bytes": 0}, ValueError, "chunk_bytes is 0, expected at least 1"),
    ({"chunk_bytes": 1e9}, TypeError, "chunk_bytes is a float, expected an int"),
    ({"logits_dtype": torch.float16}, ValueError, "logits_dtype is torch.float16, expected None"),
    ({"row_index": [1]}, TypeError, "row_index is a list, expected an int64 torch.Tensor"),
    ({"row_index": torch.tensor([1.0])}, TypeError, "row_index is a torch.float32, expected an in"),
    ({"row_index": torch.tensor([[1]])}, ValueError, r"row_index has shape \(1, 1\) on cpu"),
    ({"row_index": torch.tensor([1], device="meta")}, ValueError, r"row_index .* on meta, expect"),
    ({"row_index": torch.tensor([1, 6])}, ValueError, "row_index goes from 1 to 6, .* of 6 rows"),
    ({"row_index": torch.tensor([-1, 2])}, ValueError, "row_index goes from -1 to 2"),
    ({"row_index": torch.tensor([2, 2])}, ValueError, "row_index .* expected increasing positions"),
]


def call(backend="auto", **changes):
    return linear_kd_loss(**{**CASE._asdict(), **changes}, backend=backend)


@pytest.mark.parametrize(("changes", "error", "match"), ARGUMENTS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_arguments(changes, error, match, backend):
    with pytest.raises(error, match=match):
        call(backend, **changes)


NOT_HERE = ("vocab_size", "token_weight", "labels", "inplace_grad")


@pytest.mark.parametrize(
    ("name", "value", "error", "match"), [case for case in OPTIONS if case[0] not in NOT_HERE]
)
def test_options_are_checked_as_those_of_kd_loss(name, value, error, match):
    with pytest.raises(error, match=match):
        call(**{"backend": "cpu", name: value})


@pytest.mark.parametrize("change", [lambda x: x[::-1], lambda x: x.astype(">f4")])
def test_arrays_that_torch_cannot_read(change):
    hidden = change(CASE.teacher_hidden.numpy())
    with pytest.raises(ValueError, match="teacher_hidden is an array that torch cannot read: "):
        call(teacher_hidden=hidden)


def test_per_token_arguments():
    with pytest.raises(ValueError, match=r"labels has shape \(6,\), expected \(2, 3\)"):
        call(labels=torch.zeros(6, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"token_weight has shape \(2,\), expected \(2, 3\)"):
        call(token_weight=torch.ones(2))
    with pytest.raises(ValueError, match=r"vocab_size is 204, expected 1 to 203.*203.*210"):
        call(vocab_size=204)


def test_teacher_logits():
    logits = {"teacher_hidden": None, "teacher_weight": None, "teacher_bias": None}
    with pytest.raises(ValueError, match="teacher_weight or teacher_bias is given, expected neith"):
        call(teacher_hidden=None, teacher_bias=None, teacher_logits=torch.zeros(2, 3, 9))
    with pytest.raises(ValueError, match=r"teacher_logits has shape \(3, 9\), expected"):
        call(**logits, teacher_logits=torch.zeros(3, 9))
    with pytest.raises(ValueError, match="teacher_logits has stride 2 in its last dimension"):
        call(**logits, teacher_logits=torch.zeros(2, 3, 18)[..., ::2])
    with pytest.raises(ValueError, match="teacher_logits requires grad, expected a constant"):
        call(**logits, teacher_logits=torch.zeros(2, 3, 9, requires_grad=True))


def test_float16_has_no_float32_logits():
    with pytest.raises(ValueError, match=r"logits_dtype is torch.float32, expected None where"):
        call(**make_case(torch.float16, lead=(2, 3))._asdict(), logits_dtype=torch.float32)


def test_backends_say_why_not():
    double = make_case(torch.float64, lead=(2, 3))._asdict()
    with pytest.raises(ValueError, match=r"cpu: student_logits is torch.float64"):
        call("cpu", **double)


def test_dtensors_are_sent_to_the_module(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(CASE.student_weight, mesh, [Shard(0)])
        with pytest.raises(TypeError, match=r"student_weight is a DTensor.*LinearKDHead"):
            call(student_weight=sharded)
    finally:
        torch.distributed.destroy_process_group()
