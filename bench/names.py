"""Name the candidates that tables and goals speak of, without an import of torch."""

PEER = "peer: "  # begins the names of other implementations
EAGER = "peer: eager, per tensor"
FOREACH = "peer: torch._foreach, fused SGD"
COMPILED = "peer: torch.compile of the foreach step"
PYTORCH_OPTIMIZER = "peer: pytorch_optimizer.SAM"
