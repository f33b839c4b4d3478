"""What: Qwen2.5-7B-Instruct, one of the paper's four models, aligned by on-policy MSD with DPSW, all weights trained.

Command:  python -m msd_jax.main --config configs/qwen2_5_7b.py --workdir DIR \
              --config.data.path=QUERIES.jsonl --config.eval.path=MULTIJAIL.csv --config.eval.harmful=true
          The variant configs/qwen2_5_7b.py:lora trains adapters, configs/qwen2_5_7b.py:smoke tries two steps anywhere.
Hardware: a pod of chips with 16 GB or more; `rollout_tensor` below divides its 28 query and 4 key/value heads.
Memory:   planned with XLA's TPU compiler (docs/plan.md): 8.3 of 15.75 GiB per chip of v5e-64 at 256 queries per step;
          152 GB over all chips are weights, teacher, gradients and AdamW in float32.
Time:     not measured on hardware.
Expected: not measured; the smoke variant runs in this project's tests.
"""

import ml_collections
from msd_jax.configs import paper


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = paper.shared()
    config.model.path = "Qwen/Qwen2.5-7B-Instruct"
    config.mesh.tensor, config.mesh.rollout_tensor, config.mesh.rollout_ffw = 2, 4, 16
    return paper.variant(config, "qwen2_5_7b", variant)
