"""What is recorded of where a result came from."""

import subprocess
import sys

import jax

from msd_jax.io import jsonl, provenance


def test_a_start_is_a_row_with_all_that_is_needed_to_repeat_it(tmp_path):
    for seed in (3, 4):
        provenance.record(tmp_path, seed, {"config.model.path: model.safetensors": "ab12"})
    first, second = jsonl.read(tmp_path / provenance.FILE)
    assert (first["seed"], second["seed"]) == (3, 4)
    assert first["hashes"] == {"config.model.path: model.safetensors": "ab12"}
    assert first["versions"]["jax"] == jax.__version__ and {"python", "msd-jax", "flax"} <= first["versions"].keys()
    assert first["devices"]["count"] == jax.device_count() and first["devices"]["kind"] == jax.devices()[0].device_kind
    assert first["begun"].endswith("+00:00") and first["command"] is None  # of pytest, which is no command of ours


def test_the_command_is_one_that_can_be_repeated():
    code = "import runpy, sys; sys.argv = ['x', '--config', 'quick start', '--workdir=a']; {}"
    probe = "sys.modules['__main__'].__spec__ = type('Spec', (), dict(name='msd_jax.{}')); "
    probe += "from msd_jax.io import provenance; print(provenance.command())"
    for module, said in (("main", "main"), ("report.__main__", "report")):
        done = subprocess.run([sys.executable, "-c", code.format(probe.format(module))], capture_output=True, text=True)
        assert done.stdout == f"python -m msd_jax.{said} --config 'quick start' --workdir=a\n", done.stderr


def test_the_commit_is_that_of_the_code_and_of_nothing_around_it(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=x", "-c", "user.email=x@example.invalid"]
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True)

    git("init")
    (tmp_path / "other.py").write_text("")
    git("add", "other.py")
    git("commit", "-m", "other")
    (tmp_path / "provenance.py").write_text("a")
    assert provenance.commit(tmp_path) == provenance._installed_from()  # untracked: a venv inside somebody's checkout
    git("add", "provenance.py")
    git("commit", "-m", "ours")
    clean = provenance.commit(tmp_path)
    assert len(clean["id"]) == 40 and clean["dirty"] is False
    (tmp_path / "provenance.py").write_text("b")
    assert provenance.commit(tmp_path) == clean | {"dirty": True}
