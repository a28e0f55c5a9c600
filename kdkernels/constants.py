"""Constants of the definition of rows and states, as in csrc; a test compares them."""

#: Where the base of an empty sum of exponentials starts: finite, so that a row of -inf needs no
#: guard, and low enough to count as -inf.
LOWEST_LOGIT = -1e30

#: A row is far where its divergence exceeds this (in nats) and no logit is infinite.
FAR_FROM = 1 / 32

#: A KL divergence is computed as a sum of two numbers. Where one is larger than the result by more
#: than this factor, too few digits are left and the row counts as near.
MOST_CANCELLED = 32.0

#: The share of a mixture's parts from which its rows may be far: logarithms of less lose digits.
LEAST_SHARE = 1 / 16
