"""What: Gemma-3-1B-it, the small text model of the JAX world, aligned by on-policy MSD with DPSW, all weights trained.

Command:  python -m msd_jax.main --config configs/gemma3_1b.py --workdir DIR \
              --config.data.path=QUERIES.jsonl --config.eval.path=MULTIJAIL.csv --config.eval.harmful=true
          The variant configs/gemma3_1b.py:lora trains adapters, configs/gemma3_1b.py:smoke tries two steps anywhere.
Hardware: one accelerator with 40 GB or more, or a few smaller ones; it has a single key/value head, so `tensor` is 1.
Memory:   estimated: 20 GB for weights, teacher, gradients and AdamW in float32 (1.0 B parameters x 20 bytes); the
          vocabulary of 262,144 adds 1 GB of logits for every 1,000 response tokens of a micro-batch.
Time:     not measured on hardware.
Expected: not measured; the smoke variant runs in this project's tests.

Gemma has no system role: its chat template puts a system message before the first user message.
"""

import ml_collections
from msd_jax.configs import paper


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    config = paper.shared()
    config.model.path = "google/gemma-3-1b-it"
    config.data.batch_size = 32
    config.train.micro_batches = 4
    config.optimizer.learning_rate = 5e-6
    config.launch.topology = "v5e:2x4"
    if variant == "smoke":
        config.train.micro_batches = 1
    return paper.variant(config, "gemma3_1b", variant)
