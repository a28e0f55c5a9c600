Rows = tuple[int, int, int, int, int, int]

class Memory:
    def __init__(self, bytes: int) -> None: ...
    def __buffer__(self, flags: int, /) -> memoryview: ...

def release_kept_memory() -> int: ...
def instruction_sets() -> list[str]: ...
def divergences() -> list[str]: ...
def logits_cpu(
    rows: int,
    vocab: int,
    student: Rows,
    teacher: Rows,
    gradient: Rows | None,
    divergence: int,
    parameter_0: float,
    parameter_1: float,
    temperature: float,
    student_scale: float,
    student_softcap: float,
    teacher_scale: float,
    teacher_softcap: float,
    kd_weight: float,
    ce_weight: float,
    labels: int,
    ignore_index: int,
    token_weight: int,
    reduction: int,
    normalizer: int,
    gradient_scale: float,
    row_scale: int,
    loss: int,
    metrics: int,
    threads: int,
    /,
) -> None: ...
def scale_cpu(
    rows: int,
    gradient: Rows,
    grad_output: int,
    grad_output_stride: int,
    row_scale: int,
    threads: int,
    /,
) -> None: ...
def cuda_why_not(device: int, /) -> str: ...
def logits_cuda(
    rows: int,
    vocab: int,
    student: Rows,
    teacher: Rows,
    gradient: Rows | None,
    divergence: int,
    parameter_0: float,
    parameter_1: float,
    temperature: float,
    student_scale: float,
    student_softcap: float,
    teacher_scale: float,
    teacher_softcap: float,
    kd_weight: float,
    ce_weight: float,
    labels: int,
    weight: int,
    normalizer: int,
    divisor: float,
    gradient_scale: float,
    row_scale: int,
    loss: int,
    metrics: int,
    device: int,
    stream: int,
    /,
) -> None: ...
def scale_cuda(
    rows: int,
    gradient: Rows,
    grad_output: int,
    grad_output_stride: int,
    row_scale: int,
    device: int,
    stream: int,
    /,
) -> None: ...
