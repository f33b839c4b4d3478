"""The command `python -m msd_jax.plan`, with libtpu, for small slices."""

import json
import subprocess
import sys

import pytest

from msd_jax.planning.compiled import GIB
from tests.conftest import REPOSITORY
from tests.planning.conftest import needs_libtpu

pytestmark = needs_libtpu


def run_plan(*flags):
    command = [sys.executable, "-m", "msd_jax.plan", *flags]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


def test_the_command_plans_for_a_slice(tmp_path):
    file = tmp_path / "plan.json"
    done = run_plan("--config=configs/qwen2_5_7b.py:smoke", "--topology=v5e:2x2", "--mesh=1,4,1", f"--json={file}")
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and "FITS" in done.stdout
    result = json.loads(file.read_text())
    assert result["fits"] and result["devices"] == 4
    for name in ("train", "relayout", "rollout"):
        program = result["programs"][name]
        assert 0 < program["peak_hbm_bytes"] < GIB and program["fits"] and program["seconds_estimate"] > 0
        assert sum(program["collective_bytes"].values()) > 0
        assert program["largest_buffers"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--topology=v5e:3x3"], "error: config.launch.topology='v5e:3x3'"),
        (["--topology=v9:2x2"], "error: config.launch.topology='v9:2x2'"),
        (["--json=no/such/file"], "error: --json=no/such/file: the directory no/such does not exist"),
        (["--topology=v5e:2x2", "--mesh=1,3,1"], "error: config.mesh=1x3x1 (data x fsdp x tensor) does not fit 4"),
    ],
)
def test_errors_are_one_line(flags, message):
    done = run_plan("--config=configs/qwen2_5_7b.py", *flags)
    assert done.returncode == 1
    assert done.stderr.startswith(message) and len(done.stderr.splitlines()) == 1
