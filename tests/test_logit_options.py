"""Models that scale or cap their logits after the head: what docs/linear.md says, and the guard.

transformers is no requirement of the tests: `benchmarks/requirements-peers.txt` says how to install
it.
"""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kdkernels import LinearKDHead

from .documents import text_of

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
NAMES = [name for name, *_ in MODELS]


def rows() -> list[tuple[str, str]]:
    section = text_of("docs/linear.md", "Models that change their logits after the head")
    return re.findall(r"^\| (.*?) \| `(.*?)` \|$", section, re.M)


def options_of(name: str, config) -> dict[str, float]:
    """What the table says, evaluated."""
    (code,) = [code for models, code in rows() if re.search(rf"(^|, ){name}(,|$)", models)]
    return eval(f"dict({code})", {"config": config})


def test_every_line_of_the_table_is_checked():
    listed = ", ".join(re.sub(", which.*", "", models) for models, _ in rows())
    assert sorted(listed.split(", ")) == sorted(NAMES)


@pytest.mark.filterwarnings("ignore")  # of transformers, about kernels it has not
@pytest.mark.parametrize(("name", "kind", "config"), MODELS, ids=NAMES)
def test_options(name, kind, config):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    if not hasattr(transformers, f"{kind}ForCausalLM"):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}ForCausalLM")
    torch.manual_seed(0)
    model_class = getattr(transformers, f"{kind}ForCausalLM")
    model = model_class(model_class.config_class(**TINY | config)).eval()
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        hidden = model.base_model(ids, use_cache=False).last_hidden_state
        logits = model(ids, use_cache=False).logits
    with pytest.raises(ValueError, match="student_scale and student_softcap are not given"):
        LinearKDHead(model)
    with pytest.raises(ValueError, match="teacher_scale and teacher_softcap are not given"):
        LinearKDHead(model.get_output_embeddings(), model)
    options = options_of(name, model.config.get_text_config())
    assert LinearKDHead(model, **options)(hidden, teacher_logits=logits) < 1e-9
    assert LinearKDHead(model, student_scale=1.0)(hidden, teacher_logits=logits) > 1e-4


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
