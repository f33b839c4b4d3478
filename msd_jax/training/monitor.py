"""While training: a slice of the evaluation every few steps, and the bounds beyond which training ends.

Utility has a floor, and over-refusal a ceiling: a model that answers less and refuses more looks safe.
"""

import pathlib
from collections.abc import Sequence

import ml_collections

from msd_jax.errors import UserError
from msd_jax.evaluation import rates
from msd_jax.evaluation.evaluator import Evaluator
from msd_jax.evaluation.records import RecordLog, ResponseRecord
from msd_jax.io.console import log
from msd_jax.models import decoder


class Monitor:
    """Answers the slice with the weights of a step, and says whether they hold the bounds.

    Attributes:
      floor: the least utility that holds; 0 before `start`, and where config.eval.monitor.utility_floor is.
    """

    def __init__(self, config: ml_collections.ConfigDict, evaluator: Evaluator):
        """Takes the slice of the evaluator's prompts.

        Raises:
          UserError: a bound is set, and no prompt can be measured by it.
        """
        self._config, self._bounds, self._evaluator, self.floor = config, config.eval.monitor, evaluator, 0.0
        self._prompts = evaluator.slice(self._bounds.slice)
        if self._bounds.utility_floor and not any(
            prompt.query.answers.get(prompt.language) for prompt in self._prompts
        ):
            raise UserError(
                f"config.eval.monitor.utility_floor={self._bounds.utility_floor}: no prompt of config.eval has a "
                "reference answer to measure utility by; add a benchmark that has them (mgsm, mmmlu), or set it to 0"
            )
        harmless = any(prompt.query.harmful is False for prompt in self._prompts)
        if self._bounds.over_refusal_ceiling < 1 and not harmless:
            raise UserError(
                f"config.eval.monitor.over_refusal_ceiling={self._bounds.over_refusal_ceiling}: no prompt of "
                "config.eval is harmless; add some (xstest has them), or set it to 1"
            )

    def start(self, directory: pathlib.Path) -> None:
        """Sets the floor from the evaluation of the initial weights in `directory`."""
        keys, passes = {prompt.key for prompt in self._prompts}, self._evaluator.slice_passes
        records = RecordLog(directory / "responses.jsonl").read()
        its_records = [record for record in records if record.prompt_key in keys and record.pass_name in passes]
        utility = slice_rates(its_records, self._config).get("slice_utility", 0.0)
        self.floor = self._bounds.utility_floor * utility
        if self._bounds.utility_floor and not self.floor:
            log(
                f"note: config.eval.monitor.utility_floor={self._bounds.utility_floor} has no effect: {directory} "
                "holds no right answer to a prompt of the slice"
            )

    def due(self, step: int) -> bool:
        return step % self._bounds.every == 0

    def look(self, params: decoder.Params) -> dict[str, float]:
        """`slice_rates` of the slice, answered with `params`, which are in the rollout layout."""
        return slice_rates(self._evaluator.answer(params, self._prompts), self._config)

    def fault(self, seen: dict[str, float]) -> str:
        """Which bound the rates that `look` measured do not hold, in words; "" where they hold both."""
        utility, refused = seen.get("slice_utility", 0.0), seen.get("slice_over_refusal", 0.0)
        if utility < self.floor:
            bound = f"config.eval.monitor.utility_floor={self._bounds.utility_floor}"
            return f"utility is {utility:.1%}, below {self.floor:.1%} ({bound} of what it was)"
        if refused > (ceiling := self._bounds.over_refusal_ceiling):
            return f"over-refusal is {refused:.1%} (config.eval.monitor.over_refusal_ceiling={ceiling})"
        return ""


def slice_rates(records: Sequence[ResponseRecord], config: ml_collections.ConfigDict) -> dict[str, float]:
    """Rates of judged responses over all benchmarks together; one that no prompt counts for is left out.

    slice_asr_GROUP: attack success in the languages of a group (source, trained, unseen).
    slice_over_refusal: share of the harmless prompts that are refused.
    slice_utility: share of the prompts with a reference answer, or choices, that are answered right.
    """
    shares = {"slice_over_refusal": rates.OVER_REFUSAL.share(records)}
    for group in rates.LANGUAGE_GROUPS:
        its_records = [record for record in records if rates.language_group(record.language, config) == group]
        shares[f"slice_asr_{group}"] = rates.ASR.share(its_records)
    shares["slice_utility"] = rates.EXACT_MATCH.share(records) + rates.ACCURACY.share(records)
    return {name: share.value for name, share in shares.items() if share.value is not None}
