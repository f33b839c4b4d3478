"""What: Llama-2-7B-Chat, one of the paper's four models, aligned by on-policy MSD with DPSW, all weights trained.

Command:  python -m msd_jax.main --config configs/llama2_7b.py --workdir DIR \
              --config.data.path=QUERIES.jsonl --config.eval.path=MULTIJAIL.csv --config.eval.harmful=true
          The variant configs/llama2_7b.py:lora trains adapters, configs/llama2_7b.py:smoke tries two steps anywhere.
Hardware: a pod of chips with 16 GB or more; `tensor` below divides its 32 heads, each with its own keys and values.
Memory:   estimated: 134 GB over all chips for weights, teacher, gradients and AdamW in float32 (6.7 B parameters
          x 20 bytes), and 3.4 GB per chip for the weights in bfloat16 while it generates.
Time:     not measured on hardware.
Expected: not measured; the smoke variant runs in this project's tests.

Its tokenizer spells Bangla in bytes: three to four tokens a letter, hence the longer limits.
"""

import ml_collections
from msd_jax.configs import paper


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = paper.shared()
    config.model.path = "meta-llama/Llama-2-7b-chat-hf"
    config.prompts.student_limit = 1024
    config.prompts.teacher_limit = 1024
    config.mesh.tensor = 4
    return paper.variant(config, "llama2_7b", variant)
