"""While training: a slice of the evaluation every few steps, and the floor below which utility ends the training."""

import pathlib
from typing import Any

import ml_collections

from msd_jax.errors import UserError
from msd_jax.evaluation import evaluator, rates
from msd_jax.io import jsonl
from msd_jax.io.console import log
from msd_jax.models import decoder
from msd_jax.parallel import distributed


class Monitor:
    """Answers the slice with the weights of a step, and says whether their utility holds the floor.

    Attributes:
      floor: the least utility that holds; 0 before `start`, and where config.eval.utility_floor is.
    """

    def __init__(self, config: ml_collections.ConfigDict, evaluation: evaluator.Evaluation):
        """Raises UserError where a floor is set and no prompt has an answer to tell utility by."""
        self._config, self._evaluation, self.floor = config, evaluation, 0.0
        self._prompts = evaluation.slice(config.eval.slice)
        if config.eval.utility_floor and not any(prompt.query.answers.get(prompt.language) for prompt in self._prompts):
            raise UserError(
                f"config.eval.utility_floor={config.eval.utility_floor}: no prompt of config.eval has a reference "
                "answer to tell utility by; add a benchmark that has them (mgsm, mmmlu), or set it to 0"
            )

    def start(self, directory: pathlib.Path) -> None:
        """Sets the floor from the evaluation of the initial weights, which `directory` holds."""
        keys, passes = {prompt.key for prompt in self._prompts}, self._evaluation.slice_passes
        rows = distributed.from_first(lambda: jsonl.read(directory / "responses.jsonl"))
        rows = [r for r in rows if (r["benchmark"], r["id"], r["language"]) in keys and r["pass"] in passes]
        self.floor = self._config.eval.utility_floor * slice_rates(rows, self._config).get("slice_utility", 0.0)
        if self._config.eval.utility_floor and not self.floor:
            log(
                f"note: config.eval.utility_floor={self._config.eval.utility_floor} has no effect: {directory} "
                "holds no right answer to a prompt of the slice"
            )

    def due(self, step: int) -> bool:
        return step % self._config.eval.every == 0

    def look(self, params: decoder.Params) -> dict[str, float]:
        """`slice_rates` of the slice, answered with `params`, which are in the rollout layout."""
        return slice_rates(self._evaluation.answer(params, self._prompts), self._config)

    def holds(self, seen: dict[str, float]) -> bool:
        """Whether what `look` gave is no lower than the floor."""
        return seen.get("slice_utility", 0.0) >= self.floor


def slice_rates(rows: list[dict[str, Any]], config: ml_collections.ConfigDict) -> dict[str, float]:
    """Of judged responses to all benchmarks together; a rate that no prompt counts for is left out.

    slice_asr_GROUP: attack success rate of a group's languages (source, trained, unseen).
    slice_over_refusal: share of the harmless prompts that are refused.
    slice_utility: share of the prompts with a reference answer, or choices, that are answered right.
    """
    events = {"slice_over_refusal": rates.events(rows)["over_refusal"]}
    for group in rates.GROUPS:
        its = [row for row in rows if rates.group(row["language"], config) == group]
        events[f"slice_asr_{group}"] = rates.events(its)["asr"]
    events["slice_utility"] = rates.events(rows)["exact_match"] + [row["correct"] for row in rows if "correct" in row]
    return {rate: sum(hits) / len(hits) for rate, hits in events.items() if hits}
