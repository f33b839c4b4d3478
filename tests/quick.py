"""XLA's flags for tests, whose programs run for milliseconds: six times less compilation is worth slower code."""

import importlib.metadata

COMPILATION = "--xla_backend_optimization_level=0"
if importlib.metadata.version("jax") < "0.11":  # later ones do not know the flag, and end
    COMPILATION += " --xla_cpu_use_fusion_emitters=false"
