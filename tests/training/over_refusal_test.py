"""A run that collapses into refusals looks safe: its attack success is 0%. The ceiling on over-refusal ends it."""

import json

import ml_collections

from msd_jax.io import jsonl
from msd_jax.training import checkpoint, loop
from tests.training.monitor_test import set_up, small


def test_a_run_that_learns_to_refuse_everything_ends_at_the_ceiling_and_goes_back(tmp_path, capsys):
    config = small()
    config.data.harmful_share, config.rollout.policy = 1.0, "off_policy"  # nothing but refusals to learn from
    config.optimizer.learning_rate, config.optimizer.schedule, config.optimizer.warmup_steps = 2e-3, "constant", 0
    config.train.export, config.eval.languages, config.eval.limit = False, ("sw",), 24
    config.eval.monitor.over_refusal_ceiling = 0.25
    config.data.languages = ml_collections.ConfigDict({"sw": 1.0})
    loop.train(set_up(config, tmp_path))
    rows = [row for row in jsonl.read(tmp_path / "metrics.jsonl") if "slice_over_refusal" in row]
    assert [row["slice_over_refusal"] <= 0.25 for row in rows] == [True] * (len(rows) - 1) + [False]
    assert rows[-1]["slice_asr_trained"] == 0 and rows[-1]["step"] < config.train.steps
    held = rows[-2]["step"]
    said = " ".join(capsys.readouterr().out.split())
    refused = f"{rows[-1]['slice_over_refusal']:.1%} (config.eval.monitor.over_refusal_ceiling=0.25)"
    assert f"stopped after step {rows[-1]['step']}: the slice's over-refusal is {refused}" in said
    assert f"went back to step {held}" in said and checkpoint.Checkpoints(tmp_path).latest == held
    assert json.loads((tmp_path / "eval" / str(held) / "summary.json").read_text())
