"""Floating-point operations of a traced program, counted in its jaxpr.

XLA's own cost analysis counts the body of a loop once, and most of a training step is loops. Here it counts once per
iteration.
"""

import math
from collections.abc import Iterator
from typing import Any

from msd_jax.errors import UserError

# Products of [T, H] and [H, S], or the like, for each head: of cuDNN's attention, which is a primitive of JAX. The
# backward pass recomputes the weights.
_CUDNN_PRODUCTS = {"dot_product_attention_fwd_wrapper": 2, "dot_product_attention_bwd_wrapper": 5}


def count_flops(jaxpr: Any, while_trips: int | None = None) -> int:
    """Floating-point operations of the matrix products and convolutions of a jaxpr, over all devices.

    A multiplication and an addition are two. What jax.checkpoint recomputes is counted again. A conditional counts as
    its costliest branch; kernels (pallas_call) count every cell of their grid, skipped ones too, and cuDNN's attention
    every key for every query.

    Args:
      jaxpr: ClosedJaxpr or Jaxpr, such as jax.jit(f).trace(...).jaxpr.
      while_trips: iterations of while loops, which a jaxpr does not state; None: it has none that matter.

    Raises:
      UserError: a while loop has operations and `while_trips` is None.
    """
    return sum(_equation_flops(equation, while_trips) for equation in getattr(jaxpr, "jaxpr", jaxpr).eqns)


def _equation_flops(equation: Any, while_trips: int | None) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        lhs = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel, numbers = equation.invars[1].aval.shape, params["dimension_numbers"]
        taps = math.prod(kernel) // kernel[numbers.rhs_spec[0]]
        return 2 * math.prod(equation.outvars[0].aval.shape) * taps
    if name in _CUDNN_PRODUCTS:
        (B, T, N, H), S = equation.invars[0].aval.shape, equation.invars[1].aval.shape[1]
        return _CUDNN_PRODUCTS[name] * 2 * B * N * T * S * H
    inner = [count_flops(sub, while_trips) for sub in _sub_jaxprs(params)]
    if name == "scan":
        return params["length"] * sum(inner)
    if name == "while" and sum(inner):
        if while_trips is None:
            raise UserError(f"no trip count is declared for the while loop in {equation.source_info.name_stack}")
        return while_trips * sum(inner)
    if name == "cond":
        return max(inner, default=0)
    if name == "shard_map":  # its body is the work of one shard
        return math.prod(params["mesh"].shape[axis] for axis in params["newly_manual_axes"]) * sum(inner)
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid) * sum(inner)
    return sum(inner)


def _sub_jaxprs(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, (tuple, list)) else (value,):
            if hasattr(getattr(item, "jaxpr", item), "eqns"):
                yield item
