"""What a resumed run may change, and what it must not."""

import threading

import ml_collections
import numpy as np
import pytest
from msd_jax.configs import default

from msd_jax.errors import UserError
from msd_jax.training import checkpoint


def changes(**values) -> list[str]:
    config = default.get_config()
    old = checkpoint.plain(config)
    for key, value in values.items():
        *sections, name = key.split("__")
        section = config
        for part in sections:
            section = section[part]
        section[name] = value
    return checkpoint.config_changes(old, config)


@pytest.mark.parametrize(
    "change",
    [
        {"train__steps": 1000},
        {"train__log_every": 5},
        {"eval__monitor__every": 50, "eval__monitor__utility_floor": 0.5},
        {"preflight__min_flip": 0.5},
        {"judge__guard__batch_size": 1},
        {"judge__openai__timeout": 5.0, "judge__openai__retries": 9, "judge__openai__concurrency": 1},
        {"judge__openai__key_variable": "KEY", "judge__openai__addresses": "private"},
        {"judge__openai__price_per_million_prompt_tokens": 1.0},
        {"mesh__tensor": 2, "launch__topology": "v6e:4x4"},
    ],
)
def test_what_changes_no_number_may_change(change):
    assert changes(**change) == []


@pytest.mark.parametrize(
    "key, value",
    [
        ("seed", 1),
        ("model__dtype", "bfloat16"),
        ("train__micro_batches", 2),
        ("eval__limit", 7),
        ("eval__languages", ("en",)),
        ("eval__monitor__slice", 3),
        ("eval__mgsm__path", "elsewhere"),
        ("judge__kind", "guard"),
        ("judge__openai__model", "another"),
        ("judge__guard__limit", 5),
    ],
)
def test_what_changes_a_number_is_named(key, value):
    (line,) = changes(**{key: value})
    assert line.startswith(f"config.{key.replace('__', '.')}: ")


def test_a_run_of_an_earlier_release_goes_on_under_the_new_names():
    config = default.get_config()
    old = checkpoint.plain(config)
    old["optimizer"] |= old["optimizer"].pop("adamw") | {"final_fraction": 0.1}
    old["data"] |= {"tfds": "", "split": "train", "data_dir": ""}
    old["eval"] |= old["eval"].pop("monitor")
    saved = old["train"].pop("checkpoints")
    old["train"] |= {"checkpoint_every": saved["every"], "checkpoints_kept": saved["kept"]}
    assert checkpoint.config_changes(old, config) == []
    old["optimizer"] |= {"b1": 0.8, "final_fraction": 0.0}
    assert checkpoint.config_changes(old, config) == [
        "config.optimizer.adamw.b1: 0.8 -> 0.9",
        "config.optimizer.final_fraction: 0.0 -> 'absent'",
    ]


def test_a_key_that_only_one_release_has_is_named():
    config = default.get_config()
    old = checkpoint.plain(config)
    del old["loss"]["beta"]
    old["loss"]["gamma"] = 1
    assert checkpoint.config_changes(old, config) == [
        "config.loss.beta: 'absent' -> 0.5",
        "config.loss.gamma: 1 -> 'absent'",
    ]


def test_a_workdir_from_before_spikes_could_be_skipped_is_one_that_skips_none():
    config = default.get_config()
    old = checkpoint.plain(config)
    del old["train"]["skip_spikes"]
    assert checkpoint.config_changes(old, config) == []
    config.train.skip_spikes = 5.0
    assert checkpoint.config_changes(old, config) == ["config.train.skip_spikes: 0.0 -> 5.0"]


def test_paths_may_differ_between_machines():
    config = ml_collections.ConfigDict({"model": {"path": "/here", "dtype": "float32"}, "data": {"path": "/there"}})
    assert checkpoint.without_paths(config) == {"model.dtype": "float32"}


def test_steps_are_saved_whole_and_the_last_are_kept(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path, kept=2, record={"config": {"seed": 1}})
    assert checkpoints.latest is None and checkpoints.steps == []
    for step in (2, 4, 6):
        checkpoints.save(step, {"x": np.full(3, step)}, {"next_index": 10 * step})
    checkpoints.close()
    again = checkpoint.Checkpoints(tmp_path)
    assert again.latest == 6 and again.steps == [6, 4]
    state, data = again.restore(4, {"x": np.zeros(3, int)})
    assert state["x"].tolist() == [4, 4, 4] and data == {"next_index": 40}
    assert checkpoint.recorded(tmp_path, "config") == {"seed": 1} and checkpoint.recorded(tmp_path, "inputs") == {}


def test_a_part_that_cannot_be_written_ends_the_wait_for_the_others(tmp_path):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    # As Orbax leaves it: the thread waits at a barrier that the other processes do not come to.
    checkpoints._sealer, checkpoints._saving = threading.Thread(target=threading.Event().wait, daemon=True), 4
    checkpoints._sealer.start()
    checkpoints._manager.failure = ValueError("RESOURCE_EXHAUSTED: No space left on device")
    with pytest.raises(UserError, match=r"^checkpoint 4 could not be written: No space left on device; "):
        checkpoints.wait()


def test_what_orbax_could_not_write_is_kept(tmp_path, monkeypatch):
    checkpoints = checkpoint.Checkpoints(tmp_path)
    monkeypatch.setattr(checkpoint.ocp.CheckpointManager, "_wait_for_checkpointers", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        checkpoints._manager._wait_for_checkpointers()
    with pytest.raises(ZeroDivisionError):
        checkpoints.check()
