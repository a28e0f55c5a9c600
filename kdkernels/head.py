"""Losses as calls of the student's LM head, for whatever hooks into module calls."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .linear import linear_kd_loss
from .linear_sparse import linear_sparse_kd_loss
from .modules import LinearKDLoss, LinearSparseKDLoss, LossModule
from .options import Metrics

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .keywords import LinearKDOptions, LinearSparseKDOptions

#: What a model's config calls a change of logits after the head, or of hidden states before it. The
#: same name divides in one model and multiplies in another: docs/linear.md has a table.
_CHANGE = re.compile(
    r"(final_)?logits?_(soft_?cap|scal|mup)|lm_head_multiplier|output_multiplier|dim_model_base"
    r"|scale_decoder_outputs"
)

_LORA = ("lora_A", "lora_B", "lora_dropout")  # of layers, by adapter

_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class _HeadModule(LossModule):
    """Base: a loss of hidden states that runs inside a call of the student's head."""

    def __init__(self, lm_head: nn.Module, **options: Any) -> None:
        super().__init__(**options)
        self.lm_head = _head_of("student", lm_head, options)
        _check_layer("lm_head", _without_adapters(self.lm_head))

    def _loss(
        self, function: Callable, hidden: Tensor, **arguments: Any
    ) -> Tensor | tuple[Tensor, Metrics]:
        """``function(hidden, weight, student_bias=bias)`` with the head's tensors and adapters."""
        arguments |= self.options
        head: Any = self.lm_head
        if not hasattr(head, "base_layer"):
            return _call(
                head,
                lambda h: function(h, head.weight, student_bias=head.bias, **arguments),
                hidden,
            )

        def with_adapters(h: Tensor) -> Tensor | tuple[Tensor, Metrics]:
            layers = [head.base_layer]
            inputs = [h]
            for name in _active_adapters(head):
                adapted = head.lora_dropout[name](h.to(head.lora_A[name].weight.dtype))
                inputs.append(head.lora_A[name](adapted) * head.scaling[name])
                layers.append(head.lora_B[name])

            def sum_of_products(*hidden: Tensor) -> Tensor | tuple[Tensor, Metrics]:
                weights = [layer.weight for layer in layers]
                return function(hidden, weights, student_bias=layers[0].bias, **arguments)

            return _call_all(layers, inputs, sum_of_products)

        return _call(head, with_adapters, hidden)


class LinearKDHead(_HeadModule):
    """:func:`kdkernels.linear_kd_loss` as a module call of the student's LM head.

    The loss needs the head's weight, not its logits. Frameworks that shard or gather weights
    (FSDP2's ``fully_shard``, DeepSpeed ZeRO-3) do so in hooks around the head's call; this module
    computes the loss inside such a call, so that they see a normal one, with the hidden states as
    input and the loss as output. Wrap it, or the model that calls it, as you would the head.

    Args:
        lm_head: an ``nn.Linear``, parametrized or with hooks as it may be; or a LoRA layer like
            those of PEFT, whose frozen weight gets no gradient work. A weight tied to embeddings
            gets the sum of both gradients, as always. Or a Hugging Face model, whose head is used.
        teacher_head: the frozen teacher's ``nn.Linear``, where its weight too must be gathered
            by a call, or the model. It does not become a submodule. Or pass ``teacher_weight`` to
            the call.
        **options: any keyword of :func:`kdkernels.linear_kd_loss` but the per-call tensors.

    Raises:
        ValueError: a model whose config mentions a scale or cap of its logits, without the options
            ``student_scale`` or ``student_softcap`` (for the teacher, ``teacher_scale`` or
            ``teacher_softcap``); or one with layers between its last hidden states and its head,
            such as BERT.
        TypeError: a head it cannot take: whose forward is not that of ``nn.Linear`` (its logits
            may be more than the product), such as quantized heads, DoRA and other adapters, a LoRA
            layer with a bias, FSDP1's wrapper (wrap this module instead) or a head sharded over the
            vocabulary.

    As a submodule of a model it puts the head's weight into ``state_dict`` a second time, and a
    Hugging Face model's ``save_pretrained`` may keep only that copy: delete this module first.

    Forward hooks of the head that expect logits see the loss. Inside ``torch.compile``, heads
    without hooks compile into one graph.

    Example:
        >>> import torch
        >>> from kdkernels import LinearKDHead
        >>> head = LinearKDHead(torch.nn.Linear(4, 16, bias=False), temperature=2.0)
        >>> student, teacher = torch.randn(5, 4), torch.randn(5, 8)
        >>> head(student, teacher, torch.randn(16, 8)).backward()
        >>> head.lm_head.weight.grad.shape
        torch.Size([16, 4])
    """

    known = LinearKDLoss.known

    def __init__(
        self,
        lm_head: nn.Module,
        teacher_head: nn.Module | None = None,
        **options: Unpack[LinearKDOptions],
    ) -> None:
        super().__init__(lm_head, **options)
        if teacher_head is not None:
            teacher_head = _head_of("teacher", teacher_head, options)
            _check_layer("teacher_head", teacher_head)
        self._teacher_head = (teacher_head,)  # in a tuple: no submodule

    def forward(
        self,
        student_hidden: Tensor,
        teacher_hidden: Tensor | np.ndarray | None = None,
        teacher_weight: Tensor | None = None,
        *,
        teacher_logits: Tensor | np.ndarray | None = None,
        teacher_bias: Tensor | None = None,
        labels: Tensor | None = None,
        token_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
        row_index: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Metrics]:
        """See :func:`kdkernels.linear_kd_loss`."""
        teacher_head: Any = self._teacher_head[0]
        per_call = {
            "teacher_hidden": teacher_hidden,
            "teacher_logits": teacher_logits,
            "labels": labels,
            "token_weight": token_weight,
            "normalizer": normalizer,
            "row_index": row_index,
        }

        def loss(weight: Tensor | None, bias: Tensor | None) -> Tensor | tuple[Tensor, Metrics]:
            teacher = {"teacher_weight": weight, "teacher_bias": bias}
            return self._loss(linear_kd_loss, student_hidden, **teacher, **per_call)

        if teacher_head is None or teacher_logits is not None:
            return loss(teacher_weight, teacher_bias)
        if teacher_weight is not None or teacher_bias is not None:
            raise ValueError(
                "teacher_weight or teacher_bias is given, expected neither beside teacher_head"
            )
        results = []  # no output of the teacher's call, or its hooks would wait for a backward

        def inside() -> None:
            weight, bias = teacher_head.weight, teacher_head.bias
            results.append(loss(weight.detach(), None if bias is None else bias.detach()))

        _call(teacher_head, inside)
        return results[0]


class LinearSparseKDHead(_HeadModule):
    """:func:`kdkernels.linear_sparse_kd_loss` as a module call of the student's LM head.

    Like :class:`LinearKDHead`, for a teacher known by a few tokens per row. The backward reads the
    head's weight again, as that of an ``nn.Linear`` does, so whatever shards or gathers weights
    provides it then too.

    Args:
        lm_head: as of :class:`LinearKDHead`.
        **options: any keyword of :func:`kdkernels.linear_sparse_kd_loss` but the tensors of a call.

    Raises:
        ValueError: as :class:`LinearKDHead`.
        TypeError: as :class:`LinearKDHead`.

    Example:
        >>> import torch
        >>> from kdkernels import LinearSparseKDHead
        >>> head = LinearSparseKDHead(torch.nn.Linear(4, 16, bias=False))
        >>> logprobs, indices = torch.randn(5, 16).log_softmax(-1).topk(3)
        >>> head(torch.randn(5, 4), indices, logprobs).backward()
        >>> head.lm_head.weight.grad.shape
        torch.Size([16, 4])
    """

    known = LinearSparseKDLoss.known

    if TYPE_CHECKING:

        def __init__(
            self, lm_head: nn.Module, **options: Unpack[LinearSparseKDOptions]
        ) -> None: ...

    def forward(
        self,
        student_hidden: Tensor,
        teacher_indices: Tensor,
        teacher_logprobs: Tensor,
        *,
        labels: Tensor | None = None,
        token_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Metrics]:
        """See :func:`kdkernels.linear_sparse_kd_loss`."""
        return self._loss(
            linear_sparse_kd_loss,
            student_hidden,
            teacher_indices=teacher_indices,
            teacher_logprobs=teacher_logprobs,
            labels=labels,
            token_weight=token_weight,
            normalizer=normalizer,
        )


def _head_of(side: str, model: Any, options: Mapping[str, Any]) -> nn.Module:
    """The head of a model, or the head itself; raises if the model does more than call it."""
    if not hasattr(model, "get_output_embeddings"):
        return model
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config(decoder=True)
    none = (None, 0, 1, getattr(config, "hidden_size", None))
    changes = {name: getattr(config, name) for name in dir(config) if _CHANGE.match(name)}
    changes = {name: x for name, x in changes.items() if x is True or x not in none}
    if changes and not {f"{side}_scale", f"{side}_softcap"} & options.keys():
        found = ", ".join(f"{name}={value!r}" for name, value in changes.items())
        raise ValueError(
            f"{side}_scale and {side}_softcap are not given, expected one of them for "
            f"{type(model).__name__}, whose config has {found}: its logits are not those of its "
            f"head. docs/linear.md says what to pass; {side}_scale=1.0 where nothing changes them"
        )
    head = model.get_output_embeddings()
    if head is not None and _is_last_of_several_layers(model, head):
        raise ValueError(
            f"the {side} is a {type(model).__name__}, expected a model whose logits are those of "
            "its head for its last hidden states: here they pass other layers in between. Pass the "
            "head itself, and to the call what it receives"
        )
    return head


def _is_last_of_several_layers(model: Any, head: nn.Module) -> bool:
    """Whether a model calls more than its head, as that of BERT: a dense layer and a norm."""
    if "MaskedLM" in type(model).__name__:
        return True
    # A causal BERT holds a module of them all, others their head itself, perhaps as a part of a
    # model of images, or inside adapters.
    holders = (m for m in model.modules() if any(child is head for child in m.children()))
    return not any(hasattr(holder, "get_output_embeddings") for holder in holders)


def _call(module: nn.Module, forward: Callable, *inputs: Tensor) -> Any:
    """Calls ``module(*inputs)``, hooks included, with ``forward`` in place of its own."""
    if not any(getattr(module, hooks) for hooks in _HOOKS):
        return forward(*inputs)
    before = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        return module(*inputs)
    finally:
        del vars(module)["forward"]
        if before is not None:
            vars(module)["forward"] = before


def _call_all(modules: list[nn.Module], inputs: list[Tensor], forward: Callable) -> Any:
    """Calls ``forward(*inputs)`` inside nested calls of all modules, one input for each."""
    if not modules:
        return forward(*inputs)

    def inside(first: Tensor) -> Any:
        return _call_all(modules[1:], inputs[1:], lambda *rest: forward(first, *rest))

    return _call(modules[0], inside, inputs[0])


def _without_adapters(head: Any) -> Any:
    """The layer below LoRA adapters; raises for any other adapter."""
    if not hasattr(head, "base_layer"):
        return head
    if not all(isinstance(getattr(head, name, None), nn.ModuleDict) for name in _LORA):
        raise TypeError(
            f"lm_head is a {type(head).__module__}.{type(head).__name__}, whose logits may be more "
            "than LoRA's products: expected an nn.Linear or a LoRA layer"
        )
    return head.base_layer


def _active_adapters(head: Any) -> list[str]:
    """Names of the LoRA adapters whose product is added to the head's."""
    if getattr(head, "disable_adapters", False) or getattr(head, "merged", False):
        return []
    names = [name for name in head.active_adapters if name in head.lora_A]
    for name in names:
        if getattr(head, "use_dora", {}).get(name) or name in getattr(head, "lora_variant", {}):
            raise TypeError(
                f"lm_head: adapter {name!r} is a variant of LoRA such as DoRA, expected plain LoRA"
            )
        _check_layer(f"lm_head.lora_B[{name!r}]", head.lora_B[name])
        if head.lora_B[name].bias is not None:
            raise TypeError(f"lm_head: adapter {name!r} has a bias, expected none")
    return names


def _check_layer(name: str, layer: nn.Module) -> None:
    if not isinstance(layer, nn.Module):
        raise TypeError(f"{name} is a {type(layer).__name__}, expected an nn.Linear or a model")
    if type(layer).forward is not nn.Linear.forward or "forward" in vars(layer):
        raise TypeError(
            f"{name} is a {type(layer).__name__} whose forward is not that of nn.Linear: its "
            "logits may be more than hidden @ weight.T + bias. Call linear_kd_loss with the weight "
            "that they come from, or a shard of it and group=; FSDP1 wraps LinearKDHead itself "
            "instead of the head; of PEFT's modules_to_save pass the trained one, "
            "lm_head.modules_to_save['default']"
        )
    if isinstance(layer.weight, nn.UninitializedParameter):
        raise TypeError(f"{name}.weight has no shape yet, expected (vocab, hidden)")
    if not isinstance(layer.weight, Tensor) or torch.is_complex(layer.weight):
        raise TypeError(f"{name}.weight is a {type(layer.weight).__name__}, expected a tensor")
