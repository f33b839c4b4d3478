"""A grid of runs: each is the run it says, what they share is computed once, and the table is theirs."""

import json

import ml_collections
import pytest
from msd_jax.configs import ablation as recipe
from msd_jax.configs import quickstart

from msd_jax import ablation
from msd_jax.io import jsonl
from msd_jax.training import loop, run


def small():
    config = quickstart.get_config()
    config.data.languages = ml_collections.ConfigDict({"sw": 1.0})
    config.data.batch_size = 16
    config.train.steps = 2
    config.train.export = False
    config.eval.languages = ("en", "sw")
    config.eval.limit = 16
    config.eval.batch_size = 32
    config.ablation.seeds = 2
    config.ablation.variants = ml_collections.ConfigDict(
        {
            "msd": {},
            "sft": {"rollout": {"policy": "off_policy"}, "loss": {"divergence": "cross_entropy"}},
            "careful": {"train": {"steps": 0}, "prompts": {"student_system": "Be careful."}},
        }
    )
    return config


def train(config, workdir):
    """As the command does."""
    grid = ablation.setup(ml_collections.FrozenConfigDict(config), workdir)
    ablation.train(grid, workdir)
    ablation.compare(grid, workdir)


def test_a_grid_is_its_runs_in_one_table(tmp_path, monkeypatch):
    config = ml_collections.FrozenConfigDict(small())
    train(config, tmp_path)
    compared = json.loads((tmp_path / "report" / "comparison.json").read_text())
    assert list(compared) == ["careful", "msd", "sft"]
    for name, steps in (("msd", 2), ("sft", 2), ("careful", 0)):
        summaries = [
            json.loads((tmp_path / name / str(seed) / "eval" / str(steps) / "summary.json").read_text())
            for seed in (0, 1)
        ]
        values = [summary["queries"]["groups"]["trained"]["asr"] for summary in summaries]
        assert compared[name]["rates"]["queries"]["groups"]["trained"]["asr"]["mean"] == sum(values) / 2
        assert compared[name]["seeds"] == [0, 1]
    table = (tmp_path / "report" / "comparison.md").read_text()
    names = [line.split(" | ")[0] for line in table.splitlines()[2:]]
    assert names == ["| before training", "| careful", "| msd", "| sft"]

    # A run of the grid is the run that the same settings make alone, to the bit.
    (alone,) = [one for key, one in ablation.configs(config).items() if key == ("sft", 1)]
    assert alone.seed == 1 and alone.rollout.policy == "off_policy" and not alone.ablation.variants
    loop.train(run.setup(alone, tmp_path / "alone"))
    for file in ("eval/0/responses.jsonl", "eval/2/responses.jsonl"):
        assert (tmp_path / "alone" / file).read_bytes() == (tmp_path / "sft" / "1" / file).read_bytes()
    losses = [
        [row["loss"] for row in jsonl.read(directory / "metrics.jsonl")]
        for directory in (tmp_path / "alone", tmp_path / "sft" / "1")
    ]
    assert losses[0] == losses[1]
    # Another prompt, other responses: nothing was taken over from the first variant.
    first, careful = (
        [row["settings"] for row in jsonl.read(tmp_path / name / "0" / "eval" / "0" / "responses.jsonl")]
        for name in ("msd", "careful")
    )
    assert not set(first) & set(careful)

    # What is finished is not done again, and a grid may grow.
    larger = small()
    larger.ablation.variants["as_it_comes"] = ml_collections.ConfigDict({"train": {"steps": 0}})
    larger.ablation.seeds = 1
    train(larger, tmp_path)
    monkeypatch.setattr(loop, "train", None)
    train(config, tmp_path)


def test_the_responses_before_training_are_taken_over_and_not_written_again(tmp_path):
    config = small()
    config.ablation.variants = ml_collections.ConfigDict({"msd": {}, "uniform": {"loss": {"weighting": "uniform"}}})
    config.ablation.seeds = 1
    train(config, tmp_path)
    (tmp_path / "uniform" / "0").rename(tmp_path / "old")
    path = tmp_path / "msd" / "0" / "eval" / "0" / "responses.jsonl"
    rows = jsonl.read(path)
    rows[0]["tokens"] = 1234  # a mark
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    train(config, tmp_path)
    again = jsonl.read(tmp_path / "uniform" / "0" / "eval" / "0" / "responses.jsonl")
    assert [row["tokens"] for row in again] == [row["tokens"] for row in rows]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"weightings": "uniform"}}, r"variants\.bad: .*loss\.weightings is not a known key"),
        ({"loss": {"weighting": "none"}}, r"variants\.bad: config\.loss\.weighting='none': choose one of"),
        ({"train": {"steps": "many"}}, r"config\.ablation\.variants\.bad: "),
        (
            {"data": {"retain_fraction": 0.2}, "teacher": {"kind": "live"}},
            r"variants\.bad: .*retain_fraction=0\.2 with",
        ),
    ],
)
def test_a_variant_that_is_not_fit_is_named_before_any_is_trained(changes, message, tmp_path):
    config = small()
    config.ablation.variants = ml_collections.ConfigDict({"msd": {}, "bad": changes})
    with pytest.raises(ValueError, match=message):
        train(config, tmp_path / "grid")
    assert not (tmp_path / "grid").exists()


def test_what_a_variant_reads_is_checked_before_any_is_trained(tmp_path):
    config = small()
    changes = {"prompts": {"student_limit": 2}}
    config.ablation.variants = ml_collections.ConfigDict({"msd": {}, "bad": changes})
    with pytest.raises(ValueError, match=r"variants\.bad: .* longer than config\.prompts\.student_limit=2"):
        train(config, tmp_path / "grid")
    assert not (tmp_path / "grid").exists()


def test_a_workdir_of_other_settings_is_refused_before_any_is_trained(tmp_path):
    config = small()
    config.train.steps = 0
    config.ablation.variants = ml_collections.ConfigDict({"a": {}, "b": {}})
    for key, one in ablation.configs(ml_collections.FrozenConfigDict(config)).items():
        run.claim(tmp_path / key[0] / str(key[1]), one)
    config.ablation.variants.b = ml_collections.ConfigDict({"loss": {"weighting": "uniform"}})
    with pytest.raises(ValueError, match=r"b/0 holds a run with another config[\s\S]*loss\.weighting"):
        train(config, tmp_path)
    assert not list(tmp_path.glob("*/*/eval"))


def test_the_recipe_holds_the_method_its_parts_and_its_rivals():
    grid = ablation.configs(ml_collections.FrozenConfigDict(recipe.get_config()))
    assert len(grid) == 27 and {seed for _, seed in grid} == {0, 1, 2}
    one = {name: config for (name, seed), config in grid.items() if seed == 0}
    assert one["sft"].loss.divergence == "cross_entropy" and one["sft"].rollout.policy == "off_policy"
    assert one["retain"].data.retain_fraction == 0.2 and one["dpsw"].data.retain_fraction == 0
    assert one["system_prompt"].train.steps == 0 and one["system_prompt"].prompts.student_system
    assert {one[name].loss.weighting for name in ("dpsw", "teacher", "student", "uniform")} == {
        "dpsw", "teacher", "student", "uniform"
    }  # fmt: skip
