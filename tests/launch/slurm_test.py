"""launch/slurm.sbatch under a real Slurm: a controller and two nodes on this machine (tests/launch/cluster.sh)."""

import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
import time

import pytest

from msd_jax.io import jsonl
from tests import quick
from tests.conftest import REPOSITORY


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """The environment of a shell whose sbatch submits to a cluster of two nodes without GPUs."""
    for program in ("slurmctld", "slurmd", "munged", "unshare"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed (apt-get install slurm-wlm munge)")
    if os.geteuid() or subprocess.run(["unshare", "--uts", "--mount", "true"]).returncode:
        pytest.skip("two nodes on one machine need root and their own namespaces")
    environment = {
        k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH")) and k != "JAX_PLATFORMS"
    }
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        environment["PORT"] = str(min(free.getsockname()[1], 65000))
    directory = tmp_path_factory.mktemp("slurm")
    cluster = REPOSITORY / "tests/launch/cluster.sh"
    subprocess.run([cluster, "up", directory], env=environment, check=True, timeout=60)
    try:
        yield environment | {
            "SLURM_CONF": str(directory / "slurm.conf"),
            "PYTHON": sys.executable,
            "XLA_FLAGS": quick.COMPILATION,
        }
    finally:
        subprocess.run([cluster, "down", directory], env=environment, check=True, timeout=60)


def submit(environment, directory: pathlib.Path, *command: str) -> int:
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(re.search(r"Submitted batch job (\d+)", done.stdout)[1])


def wait(environment, job: int, until, seconds: float = 170) -> str:
    """Waits until `until(state)`; returns the state."""
    deadline = time.monotonic() + seconds
    while True:
        shown = subprocess.run(["scontrol", "show", "job", str(job)], env=environment, capture_output=True, text=True)
        state = re.search(r"JobState=(\w+)", shown.stdout)[1]
        if until(state):
            return state
        assert time.monotonic() < deadline, shown.stdout
        time.sleep(0.3)


def ended(state: str) -> bool:
    return state not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING")


def test_two_tasks_run_the_quickstart(environment, tmp_path):
    flags = ["--config.launch.accelerator=gpu", "--config.launch.nodes=2", "--config.launch.gpus_per_node=0"]
    config = str(REPOSITORY / "configs/quickstart.py")
    command = [str(REPOSITORY / "launch/slurm.sbatch"), config, f"--workdir={tmp_path / 'run'}", *flags]
    job = submit(environment, tmp_path, *command, "--config.eval.limit=40", "--config.eval.passes=('greedy',)")
    assert wait(environment, job, ended) == "COMPLETED", (tmp_path / f"slurm-{job}.log").read_text()
    log = (tmp_path / f"slurm-{job}.log").read_text()
    assert "2 processes: 0 on node1, 1 on node2" in log and "mesh: data 2 x" in log
    table = log.partition("Before -> after")[2]
    assert len(re.findall(r"(?m)^sw +trained +100\.0 -> 0\.0% \[", table)) == 1


def test_a_terminated_job_saves_its_step_and_goes_on_by_itself(environment, tmp_path):
    run, config = tmp_path / "run", str(REPOSITORY / "configs/quickstart.py")
    script = str(REPOSITORY / "launch/slurm.sbatch")
    flags = [f"--workdir={run}", "--config.train.steps=100000", "--config.eval.path="]
    job = submit(environment | {"PREFLIGHT": "170"}, tmp_path, "sbatch", "--nodes=2", script, config, *flags)
    wait(environment, job, lambda state: ended(state) or len(jsonl.read(run / "metrics.jsonl")) > 3)
    log = tmp_path / f"slurm-{job}.log"
    assert re.search(r"all-reduce over 2 devices \(cpu\) on 2 machines: \d+\.\d GB/s per device", log.read_text())
    subprocess.run(["scancel", "--signal=TERM", str(job)], env=environment, check=True)
    try:
        wait(environment, job, lambda _: "resumed from step" in log.read_text())
    finally:
        subprocess.run(["scancel", str(job)], env=environment, check=True)
    assert wait(environment, job, ended, 60) == "CANCELLED"  # and not requeued, as the user asked for its end
    saved = re.search(r"preempted: step (\d+) is saved", log.read_text())
    assert saved and f"resumed from step {saved[1]}" in log.read_text()


def test_an_error_of_the_user_ends_the_job(environment, tmp_path):
    script, config = str(REPOSITORY / "launch/slurm.sbatch"), str(REPOSITORY / "configs/quickstart.py")
    flags = (f"--workdir={tmp_path / 'run'}", "--config.data.path=nothing.csv")
    job = submit(environment, tmp_path, "sbatch", "--nodes=2", script, config, *flags)
    assert wait(environment, job, ended) == "FAILED"
    assert "error: " in (log := (tmp_path / f"slurm-{job}.log").read_text()) and "requeued" not in log


def test_flags_reach_srun(environment, tmp_path):
    """Those for pyxis, which is not part of Slurm, too; a stand-in for srun shows its command."""
    (tmp_path / "srun").write_text(
        '#!/bin/sh\necho "$XLA_PYTHON_CLIENT_MEM_FRACTION $JAX_OPTIMIZATION_LEVEL $JAX_PLATFORMS: $*"\n'
    )
    (tmp_path / "srun").chmod(0o755)
    given = {
        "SLURM_JOB_ID": "1",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_ON_NODE": "96",
        "CONTAINER": "registry#image",
        "MOUNTS": "/shared:/shared",
    }
    given |= {"SRUN_FLAGS": "--mpi=none --overlap", "JAX_OPTIMIZATION_LEVEL": "O2", "PYTHON": "python"}
    done = subprocess.run(
        [REPOSITORY / "launch/slurm.sbatch", "configs/NAME.py", "--workdir=/shared/a b"],
        env=environment | given | {"PATH": f"{tmp_path}:{environment['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    container = "--container-image=registry#image --no-container-mount-home --container-mounts=/shared:/shared"
    tasks = "--ntasks-per-node=8 --kill-on-bad-exit=1 --cpus-per-task=12"
    start = f"0.9 O2 cuda,cpu: {tasks} {container} --mpi=none --overlap python -u -m msd_jax."
    assert done.stdout.splitlines() == [
        f"{start}check --seconds=60",
        f"{start}main --config=configs/NAME.py --workdir=/shared/a b",
    ]
