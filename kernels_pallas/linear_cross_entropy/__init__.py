"""Cross-entropy of a linear head: hidden states times vocabulary matrix, log-sum-exp and target
logit in one op.
"""

from kernels_pallas.linear_cross_entropy.api import IMPLEMENTATIONS, linear_cross_entropy

__all__ = ["IMPLEMENTATIONS", "linear_cross_entropy"]
