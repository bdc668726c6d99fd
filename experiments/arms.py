"""The arms that several studies compare: an output with a loss, and the colour that each has in every figure.

Each gradient is that in the logits:

    softmax + cross-entropy     gradient p - y
    softmax + squared error     half the Brier score, ||p - y||^2 / 2: gradient p_i (e_i - <p, e>), e = p - y
    linear + squared error      ||z - y||^2 / 2: gradient z - y
    sigmoid + cross-entropy     one sigmoid a class, the cross-entropies added: gradient s - y
    sigmoid + squared error     one sigmoid a class, ||s - y||^2 / 2: gradient (s - y) s (1 - s)
"""

from experiments import plots

SOFTMAX_CE = "softmax + cross-entropy"
SOFTMAX_SE = "softmax + squared error"
LINEAR_SE = "linear + squared error"
SIGMOID_CE = "sigmoid + cross-entropy"
SIGMOID_SE = "sigmoid + squared error"

ALL = (SOFTMAX_CE, SOFTMAX_SE, LINEAR_SE, SIGMOID_CE, SIGMOID_SE)
COLOURS: dict[str, str] = dict(zip(ALL, plots.PALETTE, strict=False))
