"""lm-evaluation-harness with our models added (`python -m msd_jax.lm_eval`).

    pip install -e '.[eval]'
    python -m msd_jax.lm_eval run --model msd_jax --model_args pretrained=HF_DIR,dtype=bfloat16 --tasks TASK ...

The command is the harness's own; see evaluation/harness.py. In Python:

    import lm_eval
    from msd_jax.lm_eval import MsdJaxLM
    lm_eval.simple_evaluate(model=MsdJaxLM("HF_DIR"), tasks=[...])
"""

import sys

try:
    from lm_eval.__main__ import cli_evaluate
except ImportError:
    sys.exit("error: msd_jax.lm_eval needs lm-evaluation-harness: pip install 'msd-jax[eval]'")

from msd_jax import cli
from msd_jax.evaluation.harness import MsdJaxLM
from msd_jax.parallel import distributed

__all__ = ["MsdJaxLM"]


def main(argv: list[str]) -> None:
    with distributed.together(), cli.clear_errors():
        distributed.start(argv[:1])
        cli_evaluate()


if __name__ == "__main__":
    main(sys.argv)
