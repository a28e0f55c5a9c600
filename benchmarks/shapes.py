"""The shapes that are timed: real models' vocabularies and hidden sizes, and any other."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """``rows`` tokens of a student and a teacher that share a vocabulary."""

    name: str
    rows: int
    vocab: int
    student_hidden: int = 0  # 0 where only logits are asked for
    teacher_hidden: int = 0


#: Vocabulary, hidden sizes of student and teacher.
MODELS: dict[str, tuple[int, int, int]] = {
    "gpt2": (50257, 768, 1600),  # GPT-2 124M from GPT-2 XL
    "llama3": (128256, 2048, 4096),  # Llama 3.2 1B from Llama 3.1 8B
    "qwen3": (151936, 1024, 4096),  # Qwen3 0.6B from Qwen3 8B
    "gemma3": (262144, 1152, 2560),  # Gemma 3 1B from Gemma 3 4B
}

#: What is timed where no shapes are given: sizes at which a CPU repeats a step many times.
DEFAULT = {
    "logits": ("32000", "128256"),
    "sparse": ("32000", "128256"),
    "linear": ("1024x32000x256x512", "256x128256x512x1024"),
}
DEFAULT_ROWS = {
    ("logits", "cpu"): 512,
    ("sparse", "cpu"): 512,
    ("linear", "cpu"): 128,
    ("logits", "cuda"): 8192,
    ("sparse", "cuda"): 8192,
    ("linear", "cuda"): 8192,
}


def parse(texts: list[str], level: str, rows: int) -> list[Shape]:
    """Shapes of names and of ``[ROWSx]VOCAB[xSTUDENTxTEACHER]``; ``real`` is every named one."""
    names = [name for text in texts for name in (MODELS if text == "real" else (text,))]
    shapes = [_parse(name, rows) for name in names]
    for shape in shapes:
        if level == "linear" and not shape.student_hidden:
            raise ValueError(
                f"shape {shape.name!r} has no hidden sizes, expected VOCABxSTUDENTxTEACHER"
            )
        if shape.student_hidden > shape.teacher_hidden:
            raise ValueError(
                f"shape {shape.name!r} has a student wider than its teacher, expected at most "
                f"{shape.teacher_hidden}"
            )
    return shapes


def _parse(text: str, rows: int) -> Shape:
    if text in MODELS:
        return Shape(text, rows, *MODELS[text])
    try:
        numbers = [int(part) for part in text.split("x")]
    except ValueError:
        numbers = []
    if len(numbers) not in (1, 2, 3, 4) or min(numbers) < 1:
        raise ValueError(
            f"shape {text!r} is unknown, expected real, {', '.join(MODELS)}, or "
            "[ROWSx]VOCAB[xSTUDENTxTEACHER]"
        )
    if len(numbers) in (1, 3):
        numbers.insert(0, rows)
    return Shape(text, *numbers)
