"""What: Qwen3-8B, one of the paper's four models, aligned by on-policy MSD with DPSW, all weights trained.

Command:  python -m msd_jax.main --config configs/qwen3_8b.py --workdir DIR \
              --config.data.path=QUERIES.jsonl --config.eval.path=MULTIJAIL.csv --config.eval.harmful=true
          The variant configs/qwen3_8b.py:lora trains adapters, configs/qwen3_8b.py:smoke tries two steps anywhere.
Hardware: a pod of chips with 16 GB or more; `tensor` below divides its 32 query and 8 key/value heads.
Memory:   estimated: 164 GB over all chips for weights, teacher, gradients and AdamW in float32 (8.2 B parameters
          x 20 bytes), and 4.1 GB per chip for the weights in bfloat16 while it generates.
Time:     not measured on hardware.
Expected: not measured; the smoke variant runs in this project's tests.

Thinking is off in both roles (enable_thinking=False, from configs/default.py): a teacher that thinks aloud would
teach the student to.
"""

import ml_collections
from msd_jax.configs import paper


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = paper.shared()
    config.model.path = "Qwen/Qwen3-8B"
    config.mesh.tensor = 4
    return paper.variant(config, "qwen3_8b", variant)
