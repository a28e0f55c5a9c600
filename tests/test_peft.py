"""Heads of PEFT itself, where it is installed (benchmarks/requirements-peers.txt says how).

tests/test_linear_head.py has layers like them that every run tests.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from kdkernels import LinearKDHead

from .linear_cases import relative_error

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

VOCAB = 61
IDS = torch.randint(1, VOCAB, (2, 10), generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.filterwarnings("ignore")  # of PEFT, about tied weights


def adapted(kind: str = "LoraConfig", *, tied: bool = False, **options):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
    )
    config = config, getattr(peft, kind)(task_type="CAUSAL_LM", **options)
    return peft.get_peft_model(transformers.LlamaForCausalLM(config[0]), config[1])


def gradients(model, loss) -> list[torch.Tensor]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss, parameters)]


ADAPTERS = {
    "of the body": {"target_modules": ["q_proj"]},
    "of body and head": {"target_modules": ["q_proj", "lm_head"]},
    "of the head, tied": {"target_modules": ["q_proj", "lm_head"], "tied": True},
    "of the body, a trained head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("kind", ADAPTERS)
def test_gradients_are_those_of_the_logits(kind):
    model = adapted(r=4, init_lora_weights=False, **ADAPTERS[kind])
    head = model.get_output_embeddings()
    if kind == "of the body, a trained head":
        with pytest.raises(TypeError, match=r"ModulesToSaveWrapper .* modules_to_save"):
            LinearKDHead(model)
        head = head.modules_to_save["default"]
    teacher = torch.randn(2, 10, VOCAB)
    output = model(IDS, output_hidden_states=True)
    loss = LinearKDHead(head)(output.hidden_states[-1], teacher_logits=teacher)
    actual = gradients(model, loss)
    log_p, log_q = (x.double().log_softmax(-1) for x in (teacher, model(IDS).logits))
    plain = F.kl_div(log_q, log_p, log_target=True, reduction="sum") / IDS.numel()
    for ours, expected in zip(actual, gradients(model, plain), strict=True):
        assert relative_error(ours, expected) < 1e-5


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("IA3Config", {"feedforward_modules": []}),
        ("VeraConfig", {"r": 4}),
        ("AdaLoraConfig", {"total_step": 10}),
    ],
)
def test_other_adapters_are_refused_when_made(kind, options):
    model = adapted(kind, target_modules=["lm_head"], **options)
    with pytest.raises(TypeError, match=r"lm_head is a peft.*expected an nn\.Linear or a LoRA"):
        LinearKDHead(model)


def test_dora_is_refused():
    model = adapted(r=4, use_dora=True, target_modules=["lm_head"])
    with pytest.raises(TypeError, match="variant of LoRA"):
        LinearKDHead(model)(torch.randn(3, 32), teacher_logits=torch.randn(3, VOCAB))
