"""Models that scale or cap their logits after the head: what docs/linear.md says, and the guard.

transformers is no requirement of the tests: `benchmarks/requirements-peers.txt` says how to install
it.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from kdkernels import LinearKDHead

from .documents import text_of

IDS = torch.arange(3, 27).view(2, 12)
TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.5,  # logits far enough from 0 for a cap to matter
}
GRANITE = {"logits_scaling": 5.0}

#: Model as docs/linear.md calls it, class, what its config needs beside TINY.
MODELS = [
    ("Gemma 2", "Gemma2", {"final_logit_softcapping": 2.0}),
    (
        "Gemma 3n",
        "Gemma3n",
        {
            "final_logit_softcapping": 2.0,
            "num_hidden_layers": 5,
            "num_kv_shared_layers": 0,
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 4,
            "activation_sparsity_pattern": None,
        },
    ),
    ("Gemma 4", "Gemma4", {"final_logit_softcapping": 2.0, "vocab_size_per_layer_input": 64}),
    ("VaultGemma", "VaultGemma", {"final_logit_softcapping": 2.0}),
    ("NanoChat", "NanoChat", {"final_logit_softcapping": 2.0}),
    ("RecurrentGemma", "RecurrentGemma", {"logits_soft_cap": 2.0, "lru_width": 32}),
    ("Cohere", "Cohere", {"logit_scale": 0.3}),
    ("Cohere 2", "Cohere2", {"logit_scale": 0.3}),
    ("Granite", "Granite", GRANITE),
    ("GraniteMoe", "GraniteMoe", GRANITE),
    ("GraniteMoeShared", "GraniteMoeShared", GRANITE),
    (
        "GraniteMoeHybrid",
        "GraniteMoeHybrid",
        GRANITE
        | {"layer_types": ["attention", "attention"], "num_local_experts": 2, "mamba_n_heads": 8},
    ),
    (
        "MiniCPM3",
        "MiniCPM3",
        {
            "dim_model_base": 8,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
        },
    ),
    ("HyperCLOVA X", "HyperCLOVAX", {"logits_scaling": 0.2}),
    (
        "Falcon-H1",
        "FalconH1",
        {
            "lm_head_multiplier": 0.2,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
        },
    ),
]
#: These multiply hidden states in between where their embeddings are tied.
ENCODER_DECODERS = ["T5", "LongT5"]


def rows() -> list[tuple[str, str]]:
    section = text_of("docs/linear.md", "Models that change their logits after the head")
    return re.findall(r"^\| (.*?) \| `(.*?)` \|$", section, re.M)


def options_of(name: str, config) -> dict[str, float]:
    """What the table says, evaluated."""
    (code,) = [code for models, code in rows() if re.search(rf"(^|, ){name}(,| with |$)", models)]
    return eval(f"dict({code})", {"config": config})


def test_every_line_of_the_table_is_checked():
    listed = ", ".join(re.sub(r", which.*| with tied.*", "", models) for models, _ in rows())
    assert sorted(listed.split(", ")) == sorted([name for name, *_ in MODELS] + ENCODER_DECODERS)


@pytest.mark.filterwarnings("ignore")  # of transformers, about kernels it has not
@pytest.mark.parametrize(("name", "kind", "config"), MODELS, ids=[name for name, *_ in MODELS])
def test_options(name, kind, config):
    model = transformers_model(f"{kind}ForCausalLM", TINY | config)
    with torch.no_grad():
        hidden = model.base_model(IDS, use_cache=False).last_hidden_state
        logits = model(IDS, use_cache=False).logits
    check_options(name, model, hidden, logits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ENCODER_DECODERS)
def test_options_of_encoder_decoders(name):
    config = {"vocab_size": 64, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1}
    model = transformers_model(f"{name}ForConditionalGeneration", config | {"num_heads": 2})
    with torch.no_grad():
        outputs = model(IDS, decoder_input_ids=IDS, output_hidden_states=True, use_cache=False)
    check_options(name, model, outputs.decoder_hidden_states[-1], outputs.logits)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["BertForMaskedLM", "ModernBertForMaskedLM", "RobertaForCausalLM"])
def test_layers_before_the_head(name):
    model = transformers_model(name, TINY)
    for models in ((model,), (nn.Linear(4, 8), model)):
        with pytest.raises(ValueError, match="here they pass other layers in between"):
            LinearKDHead(*models)
    LinearKDHead(model.get_output_embeddings())


def transformers_model(name: str, config: dict) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if not hasattr(transformers, name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    return model_class(model_class.config_class(**config)).eval()


def check_options(name: str, model: nn.Module, hidden: Tensor, logits: Tensor) -> None:
    with pytest.raises(ValueError, match="student_scale and student_softcap are not given"):
        LinearKDHead(model)
    with pytest.raises(ValueError, match="teacher_scale and teacher_softcap are not given"):
        LinearKDHead(model.get_output_embeddings(), model)
    options = options_of(name, model.config.get_text_config())
    assert LinearKDHead(model, **options)(hidden, teacher_logits=logits) < 1e-9
    assert LinearKDHead(model, student_scale=1.0)(hidden, teacher_logits=logits) > 1e-4


def test_layers_before_a_head_by_structure():
    """Without transformers: BERT's head is a part of a module that no user knows."""
    model = model_of()
    outer = nn.Sequential(model)  # as that of an adapter or of images
    outer.get_output_embeddings = model.get_output_embeddings
    assert LinearKDHead(outer).lm_head is model.head
    model.head = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 8))
    model.get_output_embeddings = lambda: model.head[1]
    with pytest.raises(ValueError, match="the student is a Module, expected a model whose logits"):
        LinearKDHead(model)
    model.get_output_embeddings = lambda: None
    with pytest.raises(TypeError, match="lm_head is a NoneType"):
        LinearKDHead(model)


def model_of(**config) -> nn.Module:
    model = nn.Module()
    model.config = SimpleNamespace(hidden_size=4, **config)
    model.head = nn.Linear(4, 8)
    model.get_output_embeddings = lambda: model.head
    return model


def test_a_config_without_changes():
    plain = model_of(final_logit_softcapping=None, logit_scale=1.0, dim_model_base=4)
    plain.config.attn_logit_softcapping = plain.config.router_logits_scale = 50.0
    head = LinearKDHead(plain, plain)
    assert head.lm_head is plain.head
    assert dict(head.named_parameters()).keys() == {"lm_head.weight", "lm_head.bias"}
    with pytest.raises(ValueError, match=r"config has dim_model_base=2, logits_scaling=8.0"):
        LinearKDHead(plain, model_of(logits_scaling=8.0, dim_model_base=2))
