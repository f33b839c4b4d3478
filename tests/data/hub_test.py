import os
import subprocess
import sys

import huggingface_hub
import pytest

from msd_jax.data import hub as hub_files
from tests.conftest import REPOSITORY
from tests.data.conftest import OWNER_NAME

URI = f"hf://{OWNER_NAME}"


def test_fetch_takes_data_and_nothing_else(hub):
    hub.files = {"a.csv": b"id,en\n1,x\n", "data/b.jsonl": b"{}\n", "README.md": b"#", "load.py": b"print()"}
    directory = hub_files.fetch(URI)
    assert {str(p.relative_to(directory)) for p in directory.rglob("*") if p.is_file()} == {"a.csv", "data/b.jsonl"}
    assert (directory / "a.csv").read_bytes() == hub.files["a.csv"]
    assert hub.commit in directory.parts
    assert not any("load.py" in path for path in hub.requests)


def test_fetch_one_file_or_folder_or_pattern_of_a_revision(hub):
    hub.files = {f"data/{split}-{i}.csv": f"{split}{i}".encode() for split in ("train", "test") for i in (0, 1)}
    file = hub_files.fetch(f"hf://datasets/{OWNER_NAME}@{hub.commit}/data/test-1.csv")
    assert file.read_bytes() == b"test1"
    assert [path for path in hub.requests if "/resolve/" in path and "test-1.csv" not in path] == []
    pattern = hub_files.fetch(f"{URI}/data/train-*.csv")
    assert sorted(p.name for p in pattern.parent.glob(pattern.name)) == ["train-0.csv", "train-1.csv"]
    folder = hub_files.fetch(f"{URI}/data")
    assert len(list(folder.iterdir())) == 4


def test_what_was_fetched_is_there_without_network(hub, monkeypatch):
    hub.files = {"a.csv": b"id,en\n1,x\n"}
    fetched = hub_files.fetch(f"{URI}/a.csv")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert hub_files.fetch(f"{URI}/a.csv") == fetched and len(hub.requests) == asked


def test_a_set_that_cannot_be_had_is_named_with_both_ways_to_get_it(hub):
    for uri in ("hf://nobody/nothing", f"{URI}@{'0' * 40}"):
        with pytest.raises(FileNotFoundError) as caught:
            hub_files.fetch(uri, key="config.eval.mgsm.path")
        message = str(caught.value)
        assert message.startswith(f"config.eval.mgsm.path='{uri}': neither the hub nor") and "\n" not in message
        assert "hf download --repo-type dataset " + uri.removeprefix("hf://").split("@")[0] in message
        assert "config.eval.mgsm.path=PATH" in message
    hub.files = {"a.csv": b"id,en\n1,x\n"}
    with pytest.raises(FileNotFoundError, match=r"b\.csv"):
        hub_files.fetch(f"{URI}/b.csv")


def test_offline_and_no_cache(tmp_path):
    """As a user meets it: no network, nothing in the cache."""
    code = "import sys; from msd_jax.data import hub; hub.fetch(sys.argv[1])"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code, "hf://DAMO-NLP-SG/MultiJail"],
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
    )
    line = run.stderr.strip().splitlines()[-1]
    assert "hf download --repo-type dataset DAMO-NLP-SG/MultiJail" in line and "config.data.path=PATH" in line


@pytest.mark.parametrize("uri", ["hf://", "hf://name", "hf://a b/c", "hf://owner/name@"])
def test_malformed_uris(uri):
    with pytest.raises(ValueError, match=r"config\.data\.path='hf://.*write hf://OWNER/NAME") as caught:
        hub_files.fetch(uri)
    assert "\n" not in str(caught.value)
