"""Every tolerance of the suite, against float64 on the same inputs."""

import torch

#: Divergences whose terms come straight from one exponential: (relative, absolute) for the loss.
PLAIN = ("forward_kl", "reverse_kl", "soft_cross_entropy")

#: float32 sums of terms with relative errors of a few units in the last place.
PLAIN_LOSS = (2e-6, 2e-7)

#: The others take logarithms of mixtures or powers, which rounds a few times more.
OTHER_LOSS = (5e-6, 5e-7)

#: What alpha-beta changes by from a parameter of 0 to one of 2**-14, relatively.
TINY_POWER = (2e-3, 5e-7)

#: float32 gradient, relative L2, student close to teacher: r = log q - log p loses digits there.
CLOSE_GRADIENT = 4e-5

#: Rounding of the stored gradient: half a unit in the last of 8 bits.
BFLOAT16_GRADIENT = 4e-3

#: Rounded when stored, and again when a grad_output other than 1 multiplies it.
BFLOAT16_RESCALED = 2 * BFLOAT16_GRADIENT

#: Rounding of the stored gradient, twice (scaled in the forward, unscaled in the backward).
FLOAT16_GRADIENT = 6e-4

#: Half the spacing of float16 subnormals, per element: small entries round to that.
FLOAT16_SUBNORMAL = 2.0**-25

#: TVD's sign is rounding where p and q agree to this, relatively.
TVD_TIE = 1e-5

#: Cross-entropy and entropies in float32: one logarithm of a sum, and sums of p log p.
METRIC = (2e-6, 5e-7)

#: Identical bfloat16 logits: no more than this, and no gradient at all.
IDENTICAL_LOSS = 1e-12

#: A gradient of 0 between two certain models: the difference of probabilities of 1, each rounded.
ROUNDING_OF_1 = 2.5e-7

#: A row of a gradient sums to 0 within this share of its absolute sum, in float32.
ROW_SUM = 2e-6

#: Adding a constant rounds the float32 logits: the test keeps the sum exact, so this is accuracy.
SHIFT = 5e-6

#: Mebibytes of scratch a thread may take.
SCRATCH_PER_THREAD = 4

#: Mebibytes by which two readings of a process's peak memory differ without any cause of ours.
MEMORY_NOISE = 4


def loss_tolerance(divergence: str) -> tuple[float, float]:
    return PLAIN_LOSS if divergence in PLAIN else OTHER_LOSS


def gradient_tolerance(divergence: str, dtype: torch.dtype, *, close: bool = False) -> float:
    """Relative L2 of the gradient, which has the dtype of the student."""
    if dtype == torch.bfloat16:
        return BFLOAT16_GRADIENT
    if dtype == torch.float16:
        return FLOAT16_GRADIENT
    return CLOSE_GRADIENT if close else loss_tolerance(divergence)[0]
