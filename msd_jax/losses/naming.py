"""Parameter names: the former ones keep working for a release, and which of a function's are static."""

import dataclasses
import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from msd_jax.losses.settings import LossSettings

P = ParamSpec("P")
T = TypeVar("T")


def formerly(**former: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """A decorator for a function whose parameters had other names: new="old", ...

    An old name given as a keyword is taken for the new one, with a DeprecationWarning.
    """
    names = {old: new for new, old in former.items()}

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        @functools.wraps(function)
        def renamed(*arguments: P.args, **keywords: P.kwargs) -> T:
            for old in names.keys() & keywords.keys():
                new = names[old]
                if new in keywords:
                    raise TypeError(f"{function.__name__}() got {new} and {old}, its former name")
                warnings.warn(f"{function.__name__}({old}=...) is now {new}=...", DeprecationWarning, stacklevel=2)
                keywords[new] = keywords.pop(old)
            return function(*arguments, **keywords)

        return renamed

    return decorate


def static_argnames(function: Callable[..., Any]) -> tuple[str, ...]:
    """The options of a loss: its keyword-only parameters, all static, for `jax.jit(..., static_argnames=...)`.

    Args:
      function: any function of this package.

    Returns:
      Their names. To give `beta` as an array, which `blend` takes, leave it out.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from msd_jax import losses
      >>> forward_kl = jax.jit(losses.forward_kl, static_argnames=losses.static_argnames(losses.forward_kl))
      >>> print(f"{forward_kl(jnp.zeros(2), jnp.log(jnp.array([0.25, 0.75])), temperature=0.5):.4f}")
      0.3681
    """
    parameters = inspect.signature(function).parameters.values()
    names = [parameter.name for parameter in parameters if parameter.kind == parameter.KEYWORD_ONLY]
    if any(parameter.kind == parameter.VAR_KEYWORD for parameter in parameters):  # **options, of fused_dpsw_loss
        names += [field.name for field in dataclasses.fields(LossSettings)]
    return tuple(names)
