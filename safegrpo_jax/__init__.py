"""SafeGRPO in JAX: rule-governed policy optimization for multimodal safety. See README.md."""
