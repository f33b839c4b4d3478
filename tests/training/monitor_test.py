"""A slice of the evaluation while training, and the floor that ends it."""

import collections
import json

import jax
import ml_collections
import pytest
from msd_jax.configs import quickstart

from msd_jax import settings
from msd_jax.evaluation import records
from msd_jax.io import jsonl
from msd_jax.training import checkpoint, loop, monitor, run
from tests.evaluation.made import record


def small():
    config = quickstart.get_config()
    config.data.languages = ml_collections.ConfigDict({"sw": 1.0})
    config.data.batch_size = 16
    config.train.steps = 8
    config.train.checkpoints.every = 2
    config.eval.languages = ("en", "sw", "yo")
    config.eval.passes = ("greedy",)
    config.eval.limit = 48
    config.eval.batch_size = 64
    config.eval.monitor.every = 2
    config.eval.monitor.slice = 8
    return config


def ruinous():
    """Languages are lost within a few steps."""
    config = small()
    config.optimizer.learning_rate, config.optimizer.schedule, config.optimizer.warmup_steps = 1e-2, "constant", 0
    return config


def set_up(config, workdir) -> run.Run:
    return run.setup(ml_collections.FrozenConfigDict(config), workdir)


def row(language, verdict, harmful, right=None, **more):
    return record(verdict, harmful, language=language, exact_match=right, **more)


def test_rates_are_those_counted_by_hand():
    config = small()
    rows = [
        row("en", "refused", True),
        row("sw", "unsafe", True),
        row("sw", "refused", None),
        row("sw", "unsafe", True),
        row("yo", "answered", False, right=True),
        row("en", "refused", False, right=False),
        row("sw", None, None, benchmark="mmmlu", name="likelihood", correct=True),
    ]
    assert monitor.slice_rates(rows, config) == {
        "slice_asr_source": 0.0,
        "slice_asr_trained": 2 / 3,
        "slice_over_refusal": 1 / 2,
        "slice_utility": 2 / 3,
    }
    assert monitor.slice_rates([], config) == {}


def test_the_slice_is_measured_when_it_is_due_and_is_part_of_the_evaluation(tmp_path):
    config = small()
    ready = set_up(config, tmp_path)
    loop.train(ready)
    rows = jsonl.read(tmp_path / "metrics.jsonl")
    seen = [{key for key in r if key.startswith("slice_")} for r in rows]
    assert [bool(keys) for keys in seen] == [False, True] * 4 and len(seen[1]) == 5
    # After the last step the slice says of its prompts what the whole evaluation says of them.
    prompts = ready.evaluation.slice(config.eval.monitor.slice)
    keys = {prompt.key for prompt in prompts}
    parts = collections.Counter((prompt.language, prompt.query.harmful) for prompt in prompts)
    assert len(parts) == 3 * 2 and set(parts.values()) <= {7, 8}  # evenly spread, so not always the full number
    whole = records.read(tmp_path / "eval" / "8" / "responses.jsonl")
    of_slice = [record for record in whole if record.prompt_key in keys]
    assert monitor.slice_rates(of_slice, config) == {key: rows[-1][key] for key in seen[-1]}


def test_training_ends_at_the_floor_and_goes_back_to_what_held_it(tmp_path, capsys):
    config = ruinous()
    config.eval.monitor.utility_floor = 0.9
    loop.train(set_up(config, tmp_path))
    rows = [r for r in jsonl.read(tmp_path / "metrics.jsonl") if "slice_utility" in r]
    floor = 0.9 * utility(tmp_path / "eval" / "0")
    held = [r["step"] for r in rows if r["slice_utility"] >= floor]
    assert rows[-1]["slice_utility"] < floor and rows[-1]["step"] < 8, "the setting is not ruinous enough"
    assert held == [r["step"] for r in rows[:-1]]
    step = held[-1] if held else 0
    assert f"stopped after step {rows[-1]['step']}" in capsys.readouterr().out
    assert sorted(int(path.name) for path in (tmp_path / "eval").iterdir()) == sorted({0, step})
    assert (tmp_path / "model").exists() == (step > 0)
    assert checkpoint.Checkpoints(tmp_path).latest == (step or None)
    # The same command ends in the same place.
    before = (tmp_path / "eval" / str(step) / "responses.jsonl").read_bytes()
    loop.train(set_up(config, tmp_path))
    assert (tmp_path / "eval" / str(step) / "responses.jsonl").read_bytes() == before
    assert sorted(int(path.name) for path in (tmp_path / "eval").iterdir()) == sorted({0, step})


def test_where_no_checkpoint_holds_the_floor_the_initial_weights_are_left(tmp_path, capsys):
    config = ruinous()
    config.eval.monitor.every = 4
    config.eval.monitor.utility_floor = 1.0
    ready = set_up(config, tmp_path)
    state, _ = loop.initial_state(ready)
    loop.train(ready)
    assert "went back to the initial weights" in capsys.readouterr().out
    assert not (tmp_path / "model").exists() and [path.name for path in (tmp_path / "eval").iterdir()] == ["0"]
    like = checkpoint.abstract(state)
    for step in checkpoint.Checkpoints(tmp_path).steps:  # those it went back over are neither the initial weights
        restored, _ = checkpoint.Checkpoints(tmp_path).restore(step, like)
        assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (restored.params, state.params))))


def utility(directory):
    return monitor.slice_rates(records.read(directory / "responses.jsonl"), small())["slice_utility"]


def test_a_floor_of_nothing_is_told(tmp_path, capsys):
    config = small()
    config.eval.monitor.utility_floor = 0.5
    ready = set_up(config, tmp_path / "run")
    (tmp_path / "responses.jsonl").write_text("")
    ready.monitor.start(tmp_path)
    ready.checkpoints.close()
    assert ready.monitor.floor == 0 and "utility_floor=0.5 has no effect" in capsys.readouterr().out


def test_a_floor_without_answers_is_refused(tmp_path):
    records = [{"id": str(i), "harmful": True, "texts": {"en": f"a {i} ?", "sw": f"na {i} ?"}} for i in range(8)]
    path = tmp_path / "queries.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = small()
    config.eval.path, config.eval.languages, config.eval.monitor.utility_floor = str(path), ("en", "sw"), 0.5
    with pytest.raises(ValueError, match=r"monitor\.utility_floor=0\.5: no prompt .* has a reference answer"):
        set_up(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"monitor.utility_floor": 0.5, "monitor.every": 0},
            r"monitor\.utility_floor=0\.5 with config\.eval\.monitor\.every=0",
        ),
        ({"path": ""}, r"config\.eval\.monitor\.every=2: set config\.eval\.path or config\.eval\.benchmarks"),
        ({"monitor.utility_floor": 1.5}, r"config\.eval\.monitor\.utility_floor=1\.5 must be at least 0 and at most 1"),
        ({"monitor.slice": 0}, r"config\.eval\.monitor\.slice=0 must be at least 1"),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    config = small()
    config.eval.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        settings.check(config)


def test_over_refusal_has_a_ceiling(tmp_path):
    """A collapse into refusals breaks it, with utility as it was."""
    watch = monitor.Monitor.__new__(monitor.Monitor)
    watch._bounds = ml_collections.ConfigDict({"utility_floor": 0.0, "over_refusal_ceiling": 0.25})
    watch.floor = 0.0
    assert watch.fault({"slice_utility": 0.5, "slice_over_refusal": 0.25}) == ""
    assert watch.fault({"slice_utility": 0.5, "slice_over_refusal": 0.5}) == (
        "over-refusal is 50.0% (config.eval.monitor.over_refusal_ceiling=0.25)"
    )
    watch.floor = 0.6
    assert "utility is 50.0%, below 60.0%" in watch.fault({"slice_utility": 0.5})
