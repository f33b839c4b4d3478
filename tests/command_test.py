"""The command line of each command: its help, its flags, and recipes by name."""

import pathlib
import subprocess
import sys

import pytest

from msd_jax import command, recipes
from msd_jax.errors import UserError
from tests.conftest import REPOSITORY


def msd_jax(*arguments: str, where: pathlib.Path = REPOSITORY) -> subprocess.CompletedProcess:
    run = [sys.executable, "-m", "msd_jax.command", *arguments]
    return subprocess.run(run, cwd=where, capture_output=True, text=True)


FLAGS = {
    "train": ("--config", "--workdir", "--coordinator"),
    "evaluate": ("--config", "--checkpoint", "--server", "--model", "--out", "--preflight", "--wide"),
    "report": ("--workdir", "--evaluation", "--out", "--wide"),
    "export": ("--config", "--checkpoint", "--out", "--push_to_hub", "--public"),
    "plan": ("--config", "--topology", "--mesh", "--search", "--json"),
    "prompts": ("--config", "--n"),
    "queries": ("--build", "--name", "--splits", "--harmful", "--data_dir"),
    "judge": ("--agreement", "--json"),
    "topology": ("--config", "--want"),
    "check": ("--seconds", "--mebibytes"),
}


@pytest.mark.parametrize("name", FLAGS)
def test_help_names_every_flag_and_fits_a_screen(name):
    shown = msd_jax(name, "--help")
    assert shown.returncode == 0 and not shown.stderr, shown.stderr
    for flag in FLAGS[name]:
        assert flag in shown.stdout
    assert len(shown.stdout.splitlines()) <= 40 and "See the top" not in shown.stdout
    if name != "queries":
        assert "--config.data.languages=" in shown.stdout


def test_every_command_has_its_help_tested():
    assert set(FLAGS) | {"lm-eval"} == set(command.COMMANDS)  # lm-eval hands over to the harness's own


def test_the_commands_and_the_recipes_are_listed(tmp_path):
    shown = msd_jax("--help", where=tmp_path)
    assert shown.returncode == 0 and all(f"  {name}" in shown.stdout for name in [*command.COMMANDS, "recipes"])
    listed = msd_jax("recipes", where=tmp_path)
    assert listed.returncode == 0 and "paper " not in listed.stdout
    assert "quickstart     The embedded tiny model, " in listed.stdout
    assert "NAME:lora" in listed.stdout and "qwen3_8b" in listed.stdout.splitlines()[-1]
    assert "quickstart" not in listed.stdout.splitlines()[-1]
    wrong = msd_jax("trian")
    assert wrong.returncode == 1 and "there is no such command; they are train, " in wrong.stderr


def test_a_recipe_by_name_from_any_directory(tmp_path):
    shown = msd_jax("prompts", "--config", "quickstart", "--n", "1", where=tmp_path)
    assert shown.returncode == 0 and "Swahili (sw)  teacher" in shown.stdout, shown.stderr
    wrong = msd_jax("train", "--config=quikstart", "--workdir=run", where=tmp_path)
    assert wrong.returncode == 1
    assert wrong.stderr.strip() == "error: --config=quikstart: neither a file nor a recipe; did you mean quickstart?"
    assert not list(tmp_path.iterdir())


def test_names_are_resolved_and_files_are_left_alone(tmp_path, monkeypatch):
    file = str(recipes.directory() / "quickstart.py")
    assert recipes.resolve(["--config", "quickstart", "--n=1"]) == ["--config", file, "--n=1"]
    assert recipes.resolve(["--config=qwen3_8b:lora"]) == [f"--config={recipes.directory() / 'qwen3_8b.py'}:lora"]
    for value in (file, "configs/none.py", "none.py", "../quickstart"):
        assert recipes.resolve([f"--config={value}"]) == [f"--config={value}"]
    with pytest.raises(UserError, match="neither a file nor a recipe; there are ablation, default"):
        recipes.resolve(["--config", "zzz"])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").write_text("")
    assert recipes.resolve(["--config=quickstart"]) == ["--config=quickstart"]


def test_a_missing_extra_is_one_line():
    code = (
        "import sys; sys.modules['lm_eval'] = None; sys.argv = ['x', 'lm-eval'];"
        "from msd_jax import command; command.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.strip().endswith("pip install 'msd-jax[eval]'")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("command, result", [("evaluate", "summary"), ("evaluate --preflight", "preflight")])
def test_results_are_not_overwritten_and_their_place_is_named(command, result, tmp_path):
    (tmp_path / f"{result}.json").write_text("{}")
    asked = msd_jax(*command.split(), "--config", "quickstart", f"--out={tmp_path}")
    assert asked.returncode == 1
    assert (
        asked.stderr.strip() == f"error: --out={tmp_path} holds results already ({result}.json); name another directory"
    )
    assert [file.name for file in tmp_path.iterdir()] == [f"{result}.json"]
    nowhere = msd_jax(*command.split(), "--config", "quickstart")
    assert nowhere.returncode == 1 and "--out" in nowhere.stderr and "Traceback" not in nowhere.stderr
