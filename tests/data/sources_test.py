"""config.data -> records -> batches, from one source and from several."""

import collections
import json

import ml_collections
import pytest
from msd_jax.configs import default

from msd_jax.data import files, parallel_queries, sources
from msd_jax.data.records import Query
from msd_jax.io import jsonl
from msd_jax.training import checkpoint, loop, run
from tests.conftest import WORDS
from tests.data.conftest import OWNER_NAME


def records(name: str, count: int, harmful: bool | None) -> list[Query]:
    """Queries that the tiny tokenizer knows, with ids that every source repeats."""
    texts = [{"en": f"make a {WORDS[i]} ?", "sw": f"{name} {WORDS[i]} bomu vipi"} for i in range(count)]
    return [Query(str(i), harmful, "", text) for i, text in enumerate(texts)]


@pytest.fixture
def config(model_dir, tmp_path, hub) -> ml_collections.ConfigDict:
    """Three sources, one of each kind: 5 harmful queries, 9 harmless ones, and 4 that say nothing."""
    files.write_jsonl(tmp_path / "plain.jsonl", records("yes", 5, True))
    files.write_jsonl(tmp_path / "set.jsonl", records("no", 9, False))
    files.write_jsonl(tmp_path / "hub.jsonl", records("in", 4, None))
    parallel_queries.build(str(tmp_path / "set.jsonl"), data_dir=str(tmp_path), splits={"train": 1.0})
    hub.files = {"hub.jsonl": (tmp_path / "hub.jsonl").read_bytes()}
    config = default.get_config()
    config.model.path = str(model_dir)
    config.data.sources = ml_collections.ConfigDict(
        {
            "plain": {"path": str(tmp_path / "plain.jsonl"), "weight": 2.0},
            "set": {"path": f"tfds://parallel_queries:1.0.0?data_dir={tmp_path}"},
            "hub": {"path": f"hf://{OWNER_NAME}", "harmful": "false", "weight": 1.0},
        }
    )
    config.data.batch_size = 8
    config.prompts.teacher_template = "answer in {language} : {query}"
    config.rollout.max_new_tokens = 4
    config.loss.weight_top_k = 5
    config.train.steps = 4
    config.train.checkpoints.every = 2
    config.train.completions.every = 1
    config.train.completions.kept = 8
    config.train.export = False
    config.mesh.data, config.mesh.fsdp = 8, 1
    return config


def test_ids_of_sources_do_not_collide(config):
    lines = []
    read = sources.load(config.data, lines.append)
    assert collections.Counter(sources.source_of(query.id) for query in read) == {"plain": 5, "set": 9, "hub": 4}
    assert len({query.id for query in read}) == 18
    assert {query.id: query.harmful for query in read}["hub/3"] is False
    assert read[5] == Query("plain/1", True, "", records("yes", 5, True)[1].texts)
    assert len(lines) == 4 and lines[2].startswith(f"queries: 9 of {config.data.sources.set.path}, built from sha256 ")
    assert lines[3] == "queries: 5 harmful, 13 harmless in sw"


def test_sources_of_different_languages_are_one_mixture(config, tmp_path):
    files.write_jsonl(tmp_path / "sw.jsonl", records("yes", 5, True))
    other = [Query(q.id, False, "", {"en": q.texts["en"], "yo": q.texts["sw"]}) for q in records("no", 9, False)]
    files.write_jsonl(tmp_path / "yo.jsonl", [*other, Query("x", False, "", {"en": "wash a cup", "zu": "kikombe"})])
    config.data.sources = ml_collections.ConfigDict(
        {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in ("sw", "yo")}
    )
    config.data.languages = ml_collections.ConfigDict({"sw": 1.0, "yo": 3.0, "zu": 0.0})
    lines = []
    read = sources.load(config.data, lines.append)
    assert len(read) == 14 and "yo/x" not in {query.id for query in read}
    assert lines[2:] == [
        "queries: 1 of 15 left out: no text in en, or in none of sw, yo",
        "queries: 5 harmful in sw; 9 harmless in yo (absent in 5 of 14 records, first: id 'sw/0')",
    ]
    config.data.languages = ml_collections.ConfigDict({"sw": 1.0, "yo": 3.0})
    batches = iter(run.read(ml_collections.FrozenConfigDict(config)).batches)
    drawn = collections.Counter(
        (sources.source_of(x.query_id), x.language) for _ in range(10) for x in next(batches).examples
    )
    assert drawn == {("sw", "sw"): 40, ("yo", "yo"): 40}
    config.data.source_language = "sw"
    with pytest.raises(ValueError, match=r"no record has texts both in sw, which the teacher reads, and in yo"):
        sources.load(config.data)


def test_one_source_keeps_its_ids(config, tmp_path):
    config.data.sources = ml_collections.ConfigDict()
    config.data.path = str(tmp_path / "plain.jsonl")
    assert [query.id for query in sources.load(config.data)] == list("01234")
    assert sources.weights(config.data) == {"": 1.0}
    assert sources.as_path(config.data) == sources.describe(config.data) == config.data.path


def test_as_path_reads_what_training_reads(config, tmp_path):
    with pytest.raises(ValueError, match=r"config\.data\.sources has hub, plain, set: .*config\.eval\.path"):
        sources.as_path(config.data)
    config.data.sources = ml_collections.ConfigDict()
    config.data.path = f"tfds://parallel_queries:1.0.0/train?data_dir={tmp_path}"
    assert sources.read(sources.as_path(config.data)) == sources.load(config.data) == tuple(records("no", 9, False))


def drawn(workdir) -> list[tuple[int, str]]:
    return [(row["step"], row["id"]) for row in jsonl.read(workdir / "completions.jsonl")]


def test_a_run_on_mixed_sources_goes_on_where_it_stopped(config, tmp_path):
    config.data.harmful_share = 0.25

    def train(workdir):
        loop.train(run.setup(ml_collections.FrozenConfigDict(config), workdir))

    train(tmp_path / "whole")
    whole = drawn(tmp_path / "whole")
    counts = collections.Counter(sources.source_of(id) for _, id in whole)
    assert counts == {"plain": 8, "set": 12, "hub": 12}  # of 32; `plain` alone is harmful
    config.train.steps = 2
    train(tmp_path / "parts")
    first = drawn(tmp_path / "parts")
    # As if it had been stopped: the same config, from the checkpoint after step 2.
    config.train.steps = 4
    config_file = tmp_path / "parts/config.json"
    config_file.write_text(json.dumps(json.loads((tmp_path / "whole/config.json").read_text())))
    train(tmp_path / "parts")
    assert first == whole[:16] and drawn(tmp_path / "parts") == whole
    assert checkpoint.Checkpoints(tmp_path / "parts").latest == 4


def test_queries_of_the_evaluation_are_reported_or_dropped(config, tmp_path, capsys):
    shared = [*records("yes", 2, True), Query("new", True, "", {"en": "wash a cup", "sw": "bomu kikombe no"})]
    files.write_jsonl(tmp_path / "eval.jsonl", shared)
    config.eval.path, config.data.sources = str(tmp_path / "eval.jsonl"), ml_collections.ConfigDict()
    config.data.path = str(tmp_path / "plain.jsonl")
    ready = run.setup(ml_collections.FrozenConfigDict(config), tmp_path / "report")
    ready.checkpoints.close()
    assert " of 3 queries of benchmark queries have a near-copy in the training data" in capsys.readouterr().out
    assert len(ready.records) == 5
    rows = jsonl.read(tmp_path / "report/near_duplicates.jsonl")
    exact = {(row["train_id"], row["eval_id"], row["language"]) for row in rows if row["exact"]}
    assert exact == {(id, id, language) for id in "01" for language in ("en", "sw")}
    config.data.near_duplicates = "drop"
    ready = run.setup(ml_collections.FrozenConfigDict(config), tmp_path / "drop")
    ready.checkpoints.close()
    dropped = {row["train_id"] for row in rows}
    assert "0" in dropped and {query.id for query in ready.records} == set("01234") - dropped != set()
    assert not {example.query_id for example in next(iter(ready.batches)).examples} & dropped
    config.eval.path = config.data.path
    with pytest.raises(ValueError, match="leaves no query"):
        run.setup(ml_collections.FrozenConfigDict(config), tmp_path / "all")
