"""What: Llama-3-8B-Instruct, one of the paper's four models, aligned by on-policy MSD with DPSW, all weights trained.

Command:  python -m msd_jax.main --config configs/llama3_8b.py --workdir DIR \
              --config.data.path=QUERIES.jsonl --config.eval.path=MULTIJAIL.csv --config.eval.harmful=true
          The variant configs/llama3_8b.py:lora trains adapters, configs/llama3_8b.py:smoke tries two steps anywhere.
Hardware: a pod of chips with 16 GB or more; `rollout_tensor` below divides its 32 query and 8 key/value heads.
Memory:   planned with XLA's TPU compiler (docs/plan.md): 9.2 of 15.75 GiB per chip of v5e-64 at 256 queries per step;
          160 GB over all chips are weights, teacher, gradients and AdamW in float32.
Time:     not measured on hardware.
Expected: not measured; the smoke variant runs in this project's tests.

Llama 3.1's chat template writes today's date unless it is given one; it is fixed below, so that prompts do not
change from day to day.
"""

import ml_collections
from msd_jax.configs import paper


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = paper.shared()
    config.model.path = "meta-llama/Meta-Llama-3-8B-Instruct"
    for role in ("student", "teacher"):
        config.prompts[f"{role}_template_kwargs"] = ml_collections.ConfigDict({"date_string": "26 Jul 2024"})
    config.mesh.tensor, config.mesh.rollout_tensor, config.mesh.rollout_ffw = 2, 4, 16
    return paper.variant(config, "llama3_8b", variant)
