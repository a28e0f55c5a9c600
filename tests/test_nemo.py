"""NeMo AutoModel's part of docs/replacing.md, where it is installed: its recipe in two processes.

tests/requirements-frameworks.txt and its neighbour say how to install it. Without a GPU the recipe
needs to be told that its device is the CPU.
"""

from __future__ import annotations

import os
import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from kdkernels import JSD

from .documents import text_of
from .ranks import run_two
from .test_trainers import (
    CE_WEIGHT,
    LENGTH,
    LR,
    RTOL,
    TEMPERATURE,
    VOCAB,
    assert_same_training,
    examples,
    llama,
    need,
    page,
    page_of,
    parameters,
    plain_step,
    stack,
)

NEEDED = "nemo_automodel", "torchao", "torchdata", "datasets", "PIL", "tokenizers"
PARALLEL = {"data": {"dp_size": 2}, "tensor": {"dp_size": 1, "tp_size": 2}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Where a student and a teacher lie, with the tokenizer that the recipe asks for."""
    need(*NEEDED)
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(WordLevel({f"t{i}": i for i in range(VOCAB)}, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="t0", unk_token="t0", eos_token="t1", bos_token="t2"
    )
    directory = tmp_path_factory.mktemp("models")
    for seed, hidden, name in ((0, 16, "student"), (1, 24, "teacher")):
        llama(seed, hidden).save_pretrained(directory / name)
        tokenizer.save_pretrained(directory / name)
    return str(directory)


@pytest.mark.parametrize("parallel", PARALLEL)
def test_recipe_in_two_ranks(models, parallel):
    options = {"MODELS": models, "PARALLEL": parallel, "TORCHDYNAMO_DISABLE": "1"}
    run_two("test_nemo", "check_recipe", **options)


def test_loss_in_two_ranks():
    need(*NEEDED)
    run_two("test_nemo", "check_loss")


def rows() -> list[dict[str, list[int]]]:
    """The examples with labels shifted, as NeMo's data sets do."""
    return [
        {name: x.tolist() for name, x in row.items()}
        | {"labels": [*row["labels"][1:].tolist(), -100]}
        for row in examples(8)
    ]


def on_the_cpu() -> None:
    """NeMo asks CUDA where it is, and makes a device of the answer."""
    from nemo_automodel._transformers import auto_model

    class Torch:
        device = staticmethod(lambda *_: torch.device("cpu"))

        def __getattr__(self, name: str) -> Any:
            return getattr(torch, name)

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.reset_peak_memory_stats = lambda: None
    auto_model.torch = Torch()


def config(parallel: str, learning_rate: float, loss: dict[str, Any]) -> dict[str, Any]:
    def model(name: str) -> dict[str, str]:
        return {
            "_target_": "nemo_automodel.NeMoAutoModelForCausalLM.from_pretrained",
            "pretrained_model_name_or_path": os.path.join(os.environ["MODELS"], name),
            "torch_dtype": "float32",
        }

    precise = dict.fromkeys(("param_dtype", "reduce_dtype", "output_dtype"), "float32")
    return {
        "step_scheduler": {"global_batch_size": 4, "local_batch_size": 2, "max_steps": 2},
        "dist_env": {"backend": "gloo", "timeout_minutes": 1},
        "rng": {"_target_": "nemo_automodel.components.training.rng.StatefulRNG", "seed": 0},
        "model": model("student"),
        "teacher_model": model("teacher"),
        "checkpoint": {
            "enabled": False,
            "checkpoint_dir": os.path.join(os.environ["MODELS"], "log"),
        },
        "distributed": {"strategy": "fsdp2", "mp_policy": precise, **PARALLEL[parallel]},
        "loss_fn": {"_target_": "nemo_automodel.components.loss.masked_ce.MaskedCrossEntropy"},
        "clip_grad_norm": {"max_norm": 1e9},
        "optimizer": {"_target_": "torch.optim.SGD", "lr": learning_rate},
        "dataset": {"_target_": "tests.test_nemo.rows"},
        "dataloader": {
            "_target_": "torchdata.stateful_dataloader.StatefulDataLoader",
            "collate_fn": "nemo_automodel.components.datasets.utils.default_collater",
            "shuffle": False,
        },
        **loss,
    }


def losses() -> list[dict[str, Any]]:
    """The page's configuration; cross-entropy by the recipe instead; and NeMo's loss likewise."""
    import yaml

    text = re.findall(
        r"```yaml\n(.*?)```", text_of(page_of("NeMo AutoModel"), "NeMo AutoModel"), re.S
    )[0]
    fused = yaml.safe_load(text)
    loss = fused["kd_loss_fn"]
    assert loss["_target_"] == "your_module.FusedKDLoss"
    loss["_target_"] = page("NeMo AutoModel")["FusedKDLoss"]
    assert (fused["kd_ratio"], loss["temperature"]) == (1, TEMPERATURE)
    assert (loss["kd_weight"], loss["ce_weight"]) == (1, CE_WEIGHT)
    ratio = 1 / (1 + CE_WEIGHT)
    targets = loss["_target_"], "nemo_automodel.components.loss.kd_loss.KDLoss"
    split = [{"_target_": target, "temperature": TEMPERATURE} for target in targets]
    return [fused, *({"kd_ratio": ratio, "kd_loss_fn": x} for x in split)]


def train(settings: dict[str, Any]) -> tuple[list[float], dict[str, Tensor]]:
    """The recipe's losses and parameters."""
    from nemo_automodel.components.config.loader import ConfigNode
    from nemo_automodel.recipes.llm.kd import KnowledgeDistillationRecipeForNextTokenPrediction

    logged = []

    class Recipe(KnowledgeDistillationRecipeForNextTokenPrediction):
        def log_train_metrics(self, log_data):
            logged.append(log_data.metrics["loss"])

    recipe = Recipe(ConfigNode(settings))
    recipe.setup()
    recipe.run_train_validation_loop()
    (model,) = recipe.model_parts
    return logged, {name: x.full_tensor() for name, x in parameters(model).items()}


def check_recipe() -> None:
    """Two steps, of two batches or two ranks each."""
    on_the_cpu()
    student, teacher = llama(0, hidden=16), llama(1, hidden=24)
    start = parameters(student)
    steps = [[stack(examples(8)[i : i + 4])] for i in (0, 4)]
    expected = [plain_step(student, teacher, step) for step in steps]
    for loss in losses():
        ratio = loss["kd_ratio"]
        logged, trained = train(config(os.environ["PARALLEL"], LR / ratio, loss))
        assert logged == pytest.approx([ratio * x for x in expected], rel=RTOL)
        assert_same_training(trained, parameters(student), start)


def logits_and_labels() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(2, LENGTH, VOCAB, generator=generator) for _ in range(2))
    labels = torch.randint(VOCAB, (2, LENGTH), generator=generator)
    labels[0, :5] = -100
    return student, teacher, labels


def made(loss: dict[str, Any], **options: Any) -> Any:
    """As the recipe makes it."""
    from nemo_automodel.components.config.loader import ConfigNode

    return ConfigNode(loss["kd_loss_fn"] | options).instantiate()


def both(**options: Any) -> list:
    """The page's loss and NeMo's."""
    return [made(loss, **options) for loss in losses()[1:]]


def assert_same(losses: list, student, *arguments, **options) -> None:
    results = []
    for loss in losses:
        leaf = student.detach().clone().requires_grad_()
        value = loss(1 * leaf, *arguments, **options)
        value.backward()
        results.append((value, getattr(leaf.grad, "full_tensor", lambda leaf=leaf: leaf.grad)()))
    for ours, theirs in zip(*results, strict=True):
        rtol = max(1e-5, torch.finfo(ours.dtype).eps)
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=1e-7, check_dtype=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss(dtype):
    need(*NEEDED)
    student, teacher, labels = logits_and_labels()
    arguments = student.to(dtype), teacher.to(dtype), labels
    for temperature in (1.0, 2.0):
        losses = both(temperature=temperature)
        for tokens in (None, 17):
            assert_same(losses, *arguments, num_batch_labels=tokens)
    elsewhere = both(ignore_index=7)
    assert [loss.ignore_index for loss in elsewhere] == [7, 7]
    assert_same(elsewhere, *arguments[:2], labels.masked_fill(labels == -100, 7))
    for tokens in (None, 0, 17):
        nothing = torch.full_like(labels, -100)
        assert_same(losses, *arguments[:2], nothing, num_batch_labels=tokens)


def test_divergence_of_the_configuration():
    need(*NEEDED)
    target = {"_target_": "kdkernels.JSD", "beta": 0.1}
    for divergence, expected in (("jsd", JSD()), (target, JSD(beta=0.1))):
        assert made(losses()[0], divergence=divergence).options["divergence"] == expected


def test_loss_of_a_pipeline():
    """The last stage's, without the stages."""
    need(*NEEDED)
    from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
    from nemo_automodel.recipes.llm.kd import KnowledgeDistillationRecipeForNextTokenPrediction

    student, teacher, labels = logits_and_labels()

    def last_stage(loss):
        def of_microbatches(logits):
            recipe = object.__new__(KnowledgeDistillationRecipeForNextTokenPrediction)
            recipe.kd_ratio, recipe.loss_fn, recipe.kd_loss_fn = 0.6, MaskedCrossEntropy(), loss
            recipe._ce_loss_buffer, recipe._kd_loss_buffer = [], []
            recipe._current_teacher_logits = list(teacher.split(1))
            loss_of = recipe._make_pp_kd_loss_wrapper()
            pairs = zip(logits.split(1), labels.split(1), strict=True)
            return sum(loss_of(*pair) for pair in pairs)

        return of_microbatches

    assert_same([last_stage(loss) for loss in both()], student)


def check_loss() -> None:
    """Of shards, also of a teacher's that NeMo cuts for separate meshes."""
    from nemo_automodel.recipes.kd_utils import KDMeshBridge
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    whole, teacher, labels = logits_and_labels()
    student = distribute_tensor(whole, mesh, [Shard(-1)])
    sharded = distribute_tensor(teacher, mesh, [Shard(-1)])
    cut = KDMeshBridge.match_student_vocab_shard(student, teacher)
    for shards in (sharded, cut):
        assert_same(both(), student, shards, labels, num_batch_labels=17)
