"""Built and read without TensorFlow; split by record and for good."""

import hashlib
import json
import pathlib
import random
import subprocess
import sys

import pytest

from msd_jax.data import files, parallel_queries, sources
from msd_jax.data.records import Query
from tests.conftest import REPOSITORY

# Whoever looks for TensorFlow finds none, installed or not, and nothing can import it.
WITHOUT_TENSORFLOW = """
import importlib.machinery as machinery, runpy, sys
find = machinery.PathFinder.find_spec
hidden = lambda cls, name, *rest: None if name.split(".")[0] == "tensorflow" else find(name, *rest)
machinery.PathFinder.find_spec = classmethod(hidden)
try:
    import tensorflow
except ImportError:
    pass
else:
    sys.exit("TensorFlow was imported")
"""


def make(count: int, seed: int = 0) -> tuple[Query, ...]:
    draw = random.Random(seed)
    letters = "aé한ኤব 🙂\n\u2028\"'"

    def text() -> str:
        return "x" + "".join(draw.choices(letters, k=draw.randint(0, 30)))

    return tuple(
        Query(
            f"{seed}/{i}-é",
            draw.choice((True, False, None)),
            draw.choice(("", "food", "['a', \"b\"]")),
            {code: text() for code in draw.sample(("en", "sw", "zh-Hant", "am"), draw.randint(1, 4))},
        )
        for i in range(count)
    )


def write(path: pathlib.Path, records) -> str:
    files.write_jsonl(path, records)
    return str(path)


def uri(directory: pathlib.Path, split: str = "train", reference: str = "parallel_queries:1.0.0") -> str:
    return f"tfds://{reference}/{split}?data_dir={directory}"


def python(code: str, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TENSORFLOW + code, *arguments], cwd=REPOSITORY, capture_output=True, text=True
    )


def test_the_command_builds_and_training_reads_where_tensorflow_cannot_be_imported(tmp_path):
    records = make(60)
    source = write(tmp_path / "queries.jsonl", records)
    run = "sys.argv[0] = 'msd_jax.queries'; runpy.run_module('msd_jax.queries', run_name='__main__', alter_sys=False)"
    arguments = ("--build", source, "--name", "parallel_queries:1.0.0", "--data_dir", str(tmp_path / "sets"))
    built = python(run, *arguments)
    assert built.returncode == 0, built.stderr
    checksum = hashlib.sha256(pathlib.Path(source).read_bytes()).hexdigest()
    assert (
        f"sha256 {checksum}" in built.stdout
        and f"{uri(tmp_path / 'sets')}: " in built.stdout
        and f"{uri(tmp_path / 'sets', 'test')}: " in built.stdout
    )
    directory = tmp_path / "sets/parallel_queries/1.0.0"
    assert json.loads((directory / "metadata.json").read_text())["sha256"] == checksum
    assert len(list(directory.glob("*.array_record-*"))) == 2
    code = (
        "from msd_jax.configs import default\nfrom msd_jax.data import files, sources\n"
        "config = default.get_config(); config.data.path = sys.argv[1]\n"
        "files.write_jsonl(sys.argv[2], sources.load(config.data, print)); assert 'tensorflow' not in sys.modules"
    )
    for split in ("train", "test"):
        out = str(tmp_path / f"{split}.jsonl")
        read = python(code, uri(tmp_path / "sets", split), out)
        assert read.returncode == 0, read.stderr
        assert f"{uri(tmp_path / 'sets', split)}, built from sha256 {checksum[:12]}" in read.stdout
        expected = [
            query
            for query in records
            if parallel_queries.split_of(query.id, {"train": 0.9, "test": 0.1}) == split
            and {"en", "sw"} <= set(query.texts)
        ]
        assert list(files.read(out)) == expected and expected


def test_every_record_is_in_one_split_as_it_was(tmp_path):
    records = make(300)
    source = write(tmp_path / "queries.jsonl", records)
    splits = {"train": 0.6, "validation": 0.15, "test": 0.25}
    built = parallel_queries.build(source, data_dir=str(tmp_path), splits=splits)
    read = {split: parallel_queries.read(uri(tmp_path, split))[0] for split in splits}
    assert {split: len(chosen) for split, chosen in read.items()} == built.metadata["records"]
    ids = [query.id for chosen in read.values() for query in chosen]
    assert len(ids) == len(set(ids)) == 300
    assert {query.id: query for chosen in read.values() for query in chosen} == {query.id: query for query in records}
    order = {query.id: i for i, query in enumerate(records)}
    assert all([order[q.id] for q in chosen] == sorted(order[q.id] for q in chosen) for chosen in read.values())
    both, _ = parallel_queries.read(uri(tmp_path, "train+test"))
    assert both == read["train"] + read["test"]


def test_records_that_come_and_go_move_no_other(tmp_path):
    splits = {"train": 0.7, "test": 0.3}
    records = list(make(100)) + list(make(100, seed=1))
    random.Random(0).shuffle(records)
    places = []
    for version, chosen in enumerate((records[:120], records[40:])):
        reference = f"parallel_queries/changing:1.0.{version}"
        parallel_queries.build(write(tmp_path / f"{version}.jsonl", chosen), reference, str(tmp_path), splits)
        places.append(
            {query.id: split for split in splits for query in parallel_queries.read(uri(tmp_path, split, reference))[0]}
        )
    shared = set(places[0]) & set(places[1])
    assert len(shared) == 80 and all(places[0][id] == places[1][id] for id in shared)


def test_splits_have_their_shares_and_are_for_good():
    ids = [f"q{i}" for i in range(20_000)]
    splits = {"train": 0.5, "validation": 0.2, "test": 0.3}
    placed = [parallel_queries.split_of(id, splits) for id in ids]
    for split, share in splits.items():
        assert abs(placed.count(split) / len(ids) - share) < 0.015  # four standard deviations
    # What was built long ago must be split alike tomorrow: 0.9 is 0xe666...
    digests = {id: hashlib.sha256(id.encode()).hexdigest() for id in ids[:1000]}
    late = {id for id, digest in digests.items() if digest[:4] > "e666"}
    assert {id for id in digests if parallel_queries.split_of(id, {"train": 0.9, "test": 0.1}) == "test"} == late
    assert parallel_queries.split_of("x", {"train": 1.0}) == "train"


def test_a_source_that_changed_needs_another_version(tmp_path):
    records = make(30)
    source = write(tmp_path / "queries.jsonl", records)
    first = parallel_queries.build(source, data_dir=str(tmp_path / "sets"))
    files = {path: path.stat().st_mtime_ns for path in first.directory.iterdir()}
    assert parallel_queries.build(source, data_dir=str(tmp_path / "sets")) == first  # nothing to do
    write(tmp_path / "queries.jsonl", records[1:])
    message = r"1\.0\.0 was built with sha256 .* \(now .*\): build another version \(--name parallel_queries:1\.0\.1\)"
    with pytest.raises(ValueError, match=message + ", or remove the directory"):
        parallel_queries.build(source, data_dir=str(tmp_path / "sets"))
    assert {path: path.stat().st_mtime_ns for path in first.directory.iterdir()} == files
    assert parallel_queries.read(uri(tmp_path / "sets", "train+test"))[1] == first.metadata
    second = parallel_queries.build(source, "parallel_queries:1.0.1", str(tmp_path / "sets"))
    assert sum(second.metadata["records"].values()) == 29
    for change in ({"harmful": "true"}, {"splits": {"train": 1.0}}):
        with pytest.raises(ValueError, match=rf"was built with {next(iter(change))} "):
            parallel_queries.build(source, "parallel_queries:1.0.1", str(tmp_path / "sets"), **change)


def test_a_failed_build_leaves_nothing_that_could_be_read(tmp_path, monkeypatch):
    source = write(tmp_path / "queries.jsonl", make(5))

    def fail(*_):
        raise RuntimeError("disk full")

    monkeypatch.setattr(parallel_queries, "_pairs", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        parallel_queries.build(source, data_dir=str(tmp_path / "sets"))
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError, match="build it by"):
        parallel_queries.read(uri(tmp_path / "sets"))
    parallel_queries.build(source, data_dir=str(tmp_path / "sets"))


def test_a_checksum_covers_every_file_of_a_source(tmp_path):
    for i, query in enumerate(make(2)):
        write(tmp_path / f"q-{i}.jsonl", [query])
    before = parallel_queries.checksum(str(tmp_path / "q-*.jsonl"))
    write(tmp_path / "q-1.jsonl", make(1, seed=3))
    assert parallel_queries.checksum(str(tmp_path / "q-*.jsonl")) != before


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("parallel_queries:1.0",), "write NAME"),
        (("Parallel Queries",), "write NAME"),
        (("multijail:1.0.0",), "the dataset is called parallel_queries"),
        (("parallel_queries", "", {"train": 0.9}), "adding up to 1"),
        (("parallel_queries", "", {"train": 1.0, "test": 0.0}), "a share above 0"),
    ],
)
def test_bad_builds(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        parallel_queries.build(write(tmp_path / "queries.jsonl", make(3)), *arguments)


def test_what_is_not_there_or_no_such_set(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"config\.data\.path='tfds://parallel_queries:2\.0\.0.*': there is no .*--build"
    ):
        parallel_queries.read(f"tfds://parallel_queries:2.0.0?data_dir={tmp_path}")
    parallel_queries.build(write(tmp_path / "queries.jsonl", make(50)), data_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"config\.data\.path='tfds://.*/dev\?.*': Unknown split 'dev'"):
        parallel_queries.read(uri(tmp_path, "dev"))
    (tmp_path / "parallel_queries/1.0.0/dataset_info.json").unlink()
    with pytest.raises(ValueError, match=r"is not a complete TFDS dataset .*: remove it and build again"):
        parallel_queries.read(uri(tmp_path))
    with pytest.raises(ValueError, match=r"config\.eval\.path='tfds://x': write tfds://"):
        sources.read("tfds://x", key="config.eval.path")


@pytest.mark.parametrize(
    "flags, message", [(("--splits=train",), "write train=0.9"), (("--harmful=x",), "invalid choice")]
)
def test_the_command_ends_in_one_line(tmp_path, flags, message):
    source = write(tmp_path / "queries.jsonl", make(3))
    run = [sys.executable, "-m", "msd_jax.queries", "--build", source, "--data_dir", str(tmp_path), *flags]
    result = subprocess.run(run, cwd=REPOSITORY, capture_output=True, text=True)
    assert result.returncode != 0 and message in result.stderr and "Traceback" not in result.stderr
