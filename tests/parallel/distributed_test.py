"""Real processes over loopback: the same run as one process, ended together, resumed by any number of them."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping

import numpy as np
import pytest
from safetensors.numpy import load_file

from msd_jax.io import jsonl
from msd_jax.parallel import distributed, peers, preemption
from tests import quick
from tests.conftest import REPOSITORY, slow_disk

# Weights, moments and rollouts are split over both axes, and so over processes.
FLAGS = (
    "--config.mesh.data=2",
    "--config.mesh.fsdp=2",
    "--config.data.harmful_share=0.5",
    "--config.train.steps=4",
    "--config.train.checkpoints.every=2",
    "--config.train.completions.every=2",
    "--config.eval.limit=6",
    "--config.eval.batch_size=64",
    "--config.eval.passes=('greedy',)",
)
ENVIRONMENT = os.environ | {"XLA_FLAGS": quick.COMPILATION, "PYTHON": sys.executable, "PYTHONUNBUFFERED": "1"}


_launchers: list[subprocess.Popen] = []


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left_running():
    yield
    for launcher in _launchers:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)


def start(
    processes: int, workdir: pathlib.Path, *flags: str, devices: int = 4, environment: Mapping[str, str] | None = None
) -> subprocess.Popen:
    """launch/local.sh on the quickstart; its output goes to WORKDIR.log."""
    counts = {"PROCESSES": str(processes), "DEVICES_PER_PROCESS": str(devices // processes)}
    with workdir.with_suffix(".log").open("ab") as log:
        launcher = subprocess.Popen(
            ["launch/local.sh", "configs/quickstart.py", f"--workdir={workdir}", *flags],
            cwd=REPOSITORY,
            env=ENVIRONMENT | counts | dict(environment or {}),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    _launchers.append(launcher)
    return launcher


def output(workdir: pathlib.Path) -> str:
    return workdir.with_suffix(".log").read_text()


def run(processes: int, workdir: pathlib.Path) -> str:
    """Runs to the end; returns what was printed."""
    assert start(processes, workdir, *FLAGS).wait(timeout=170) == 0, output(workdir)
    return output(workdir)


def steps(workdir: pathlib.Path) -> list[dict]:
    return jsonl.read(workdir / "metrics.jsonl")


def same_run(one: pathlib.Path, other: pathlib.Path, first: int = 1) -> None:
    for a, b in zip(steps(one)[first - 1 :], steps(other), strict=True):
        assert a["step"] == b["step"]
        for name in ("loss", "kl", "grad_norm", "response_length", "on_policy", "learning_rate"):
            np.testing.assert_allclose(a[name], b[name], rtol=1e-5, err_msg=f"{name} of step {a['step']}")
    summaries = [json.loads((workdir / "eval/4/summary.json").read_text()) for workdir in (one, other)]
    assert summaries[0] == summaries[1]


def from_checkpoint(source: pathlib.Path, target: pathlib.Path, step: int) -> pathlib.Path:
    """A workdir that was stopped after `step`."""
    shutil.copytree(source / "checkpoints" / str(step), target / "checkpoints" / str(step))
    shutil.copy(source / "config.json", target)
    return target


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("alone") / "run"
    run(1, workdir)
    return workdir


@pytest.fixture(scope="module")
def four(tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("four") / "run"
    run(4, workdir)
    return workdir


def test_four_processes_compute_what_one_does(alone, four):
    assert len(steps(alone)) == 4
    same_run(alone, four)
    assert jsonl.read(alone / "completions.jsonl")[0]["response"]
    for name in ("id", "response"):
        texts = [[line[name] for line in jsonl.read(w / "completions.jsonl")] for w in (alone, four)]
        assert texts[0] == texts[1]
    # Gathered from four processes, written by one.
    sizes = [(w / "model/model.safetensors").stat().st_size for w in (alone, four)]
    assert sizes[0] == sizes[1] > 0


def test_only_the_first_process_prints(four):
    printed = output(four)
    assert printed.count("parameters; mesh: data 2 x fsdp 2") == 1
    assert printed.count("Before -> after") == 1
    assert re.search(r"4 processes: 0 on (\S+), 1 on \1, 2 on \1, 3 on \1", printed)


def test_a_checkpoint_of_four_processes_resumes_in_one(four, alone, tmp_path):
    workdir = from_checkpoint(four, tmp_path / "run", 2)
    assert "resumed from step 2" in run(1, workdir)
    same_run(alone, workdir, first=3)


def test_a_checkpoint_of_one_process_resumes_in_two(alone, tmp_path):
    workdir = from_checkpoint(alone, tmp_path / "run", 2)
    assert "resumed from step 2" in run(2, workdir)
    same_run(alone, workdir, first=3)


LONG = ("--config.train.steps=100000", "--config.train.checkpoints.every=5", "--config.eval.path=")


def wait_for(condition, launcher: subprocess.Popen, workdir: pathlib.Path, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert launcher.poll() is None and time.monotonic() < deadline, output(workdir)
        time.sleep(0.1)


def children(launcher: subprocess.Popen) -> list[int]:
    """Process ids in the order of --process_id."""
    tasks = pathlib.Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
    if not tasks.exists():
        pytest.skip("process ids are read from /proc, which is Linux's")
    return sorted(map(int, tasks.read_text().split()))


def test_a_process_that_dies_ends_the_others_and_the_same_command_resumes(tmp_path):
    workdir = tmp_path / "run"
    launcher = start(2, workdir, *LONG, devices=2)
    wait_for(lambda: len(steps(workdir)) > 12 and (workdir / "checkpoints/10").exists(), launcher, workdir)
    os.kill(children(launcher)[1], signal.SIGKILL)
    assert launcher.wait(timeout=60) not in (0, 143)
    assert f"error: process 1 on {socket.gethostname()} died" in output(workdir)
    assert "process 1 ended with exit code 137" in output(workdir)  # and so does the one that was left
    assert "process 0 ended with exit code 42" in output(workdir)

    launcher = start(2, workdir, *LONG, devices=2)
    wait_for(lambda: re.search(r"resumed from step \d+", output(workdir)), launcher, workdir)
    resumed = int(re.search(r"resumed from step (\d+)", output(workdir))[1])
    assert resumed >= 10
    wait_for(lambda: steps(workdir)[-1]["step"] >= resumed + 3, launcher, workdir)
    assert [row["step"] for row in steps(workdir)] == list(range(1, len(steps(workdir)) + 1))

    # Preempted: one of them gets the signal, both save the same step.
    os.kill(children(launcher)[1], signal.SIGTERM)
    assert launcher.wait(timeout=60) == 143
    saved = int(re.search(r"preempted: step (\d+) is saved", output(workdir))[1])
    assert (workdir / f"checkpoints/{saved}/_CHECKPOINT_METADATA").exists()
    assert steps(workdir)[-1]["step"] == saved


def test_the_coordinator_dies(tmp_path):
    workdir = tmp_path / "run"
    launcher = start(2, workdir, *LONG, devices=2)
    wait_for(lambda: len(steps(workdir)) > 2, launcher, workdir)
    os.kill(children(launcher)[0], signal.SIGKILL)
    assert launcher.wait(timeout=60) != 0
    assert "process 0 ended with exit code 137" in output(workdir)
    assert re.search(r"process 1 ended with exit code (?!0)", output(workdir))


def test_a_stopped_coordinator_is_named_within_30_seconds_and_killed(tmp_path):
    workdir = tmp_path / "run"
    launcher = start(2, workdir, *LONG, devices=2)
    wait_for(lambda: len(steps(workdir)) > 2, launcher, workdir)
    os.kill(children(launcher)[0], signal.SIGSTOP)
    begin = time.monotonic()
    named = f"error: process 0 on {socket.gethostname()}, which coordinates the run, is silent for 24 seconds"
    wait_for(lambda: named in output(workdir), launcher, workdir, seconds=35)
    assert time.monotonic() - begin < 33  # 30 s, and what a busy machine needs
    assert launcher.wait(timeout=70) == 42
    assert "process 1 ended with exit code 42" in output(workdir)
    assert "process 0 ended with exit code 137" in output(workdir)


def answers(workdir: pathlib.Path) -> dict[tuple[str, str, str], str]:
    rows = jsonl.read(workdir / "eval/0/responses.jsonl")
    return {(row["pass"], row["language"], row["id"]): row["response"] for row in rows}


def test_sigterm_in_the_evaluation_ends_both_at_once(tmp_path):
    workdir = tmp_path / "run"
    flags = ("--config.eval.batch_size=64", "--config.eval.passes=('greedy',)")
    launcher = start(2, workdir, *LONG[:2], *flags, devices=2)
    wait_for((workdir / "eval/0/responses.jsonl").exists, launcher, workdir)
    os.kill(children(launcher)[1], signal.SIGTERM)
    assert launcher.wait(timeout=20) == 143, output(workdir)
    assert output(workdir).count("preempted: nothing finished is lost; run the same command again to resume") == 1
    assert not (workdir / "lock.json").exists() and "Traceback" not in output(workdir)

    # The same command goes on where they were.
    kept = answers(workdir)
    launcher = start(2, workdir, "--config.train.steps=0", *flags, devices=2)
    assert kept and launcher.wait(timeout=170) == 0, output(workdir)
    assert kept.items() <= answers(workdir).items()


def test_sigterm_in_the_export_ends_both_and_leaves_no_half_of_a_model(tmp_path):
    workdir, flags = tmp_path / "run", ("--config.train.steps=2", "--config.eval.path=")
    slow = slow_disk(tmp_path / "slow", "tokenizer.json", seconds=60)
    launcher = start(2, workdir, *flags, devices=2, environment=slow)
    wait_for((workdir / "model.unfinished/tokenizer.json").exists, launcher, workdir)
    os.kill(children(launcher)[1], signal.SIGTERM)  # which waits for process 0, the one that writes
    assert launcher.wait(timeout=30) == 143, output(workdir)
    assert "Traceback" not in output(workdir) and not (workdir / "lock.json").exists()
    assert not (workdir / "model").exists()
    launcher = start(2, workdir, *flags, devices=2)
    assert launcher.wait(timeout=170) == 0, output(workdir)
    assert load_file(workdir / "model/model.safetensors") and not (workdir / "model.unfinished").exists()


def by_flags(workdir: pathlib.Path, *flags_of_each: str) -> list[subprocess.CompletedProcess]:
    """One process for each of `flags_of_each`, which learns of the others by flags."""
    port = free_port()
    told = (f"--coordinator=127.0.0.1:{port}", f"--processes={len(flags_of_each)}")
    command = [sys.executable, "-m", "msd_jax.main", "--config=configs/quickstart.py", f"--workdir={workdir}", *told]
    processes = [
        subprocess.Popen(
            [*command, f"--process_id={i}", *FLAGS, *flag.split()],
            cwd=REPOSITORY,
            env=ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": "2", "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i, flag in enumerate(flags_of_each)
    ]
    return [subprocess.CompletedProcess((), p.wait(), p.communicate(timeout=60)[0]) for p in processes]


JOBSET = """
import sys
import jax._src.clusters.cloud_tpu_cluster as cluster

cluster.running_in_cloud_tpu_vm = True  # the rest is as GKE sets it up
from msd_jax.parallel import distributed

distributed.start(["program"])
import jax

with distributed.together():
    print(jax.process_index(), jax.process_count(), distributed.from_first(lambda: f"from {jax.process_index()}"))
    sys.exit(0)
"""


def test_the_processes_of_a_jobset_of_two_slices_find_each_other():
    pods = ENVIRONMENT | {
        "JAX_PLATFORMS": "cpu",
        "JAX_COORDINATOR_PORT": str(free_port()),
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_WORKER_ID": "0",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
        "MEGASCALE_NUM_SLICES": "2",
    }
    pods = [
        subprocess.Popen(
            [sys.executable, "-c", JOBSET],
            env=pods | {"MEGASCALE_SLICE_ID": str(slice_)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for slice_ in range(2)
    ]
    printed = [pod.communicate(timeout=60)[0] for pod in pods]
    assert [pod.returncode for pod in pods] == [0, 0]
    assert all(f"{slice_} 2 from 0" in printed[slice_] for slice_ in range(2)), printed


HANGS = """
import sys, threading
from msd_jax.parallel import distributed, peers

distributed.start(["program"])
peers.end_when_stalled(8)
import jax

with distributed.together():
    for step in range(10):
        if step == 3 and jax.process_index() == jax.process_count() - 1:
            threading.Event().wait()  # for a device, or a file system, that does not answer
        peers.moved(f"step {step}")
        distributed.from_all(lambda: step)
"""


def programs(text: str, processes: int, *arguments: str) -> list[subprocess.Popen]:
    """The processes of a run of the program `text`."""
    address = f"127.0.0.1:{free_port()}"
    many = {"JAX_COORDINATOR_ADDRESS": address, "JAX_COORDINATOR_BIND_ADDRESS": address}
    many |= {"JAX_NUM_PROCESSES": str(processes)}
    return [
        subprocess.Popen(
            [sys.executable, "-c", text, *arguments],
            env=ENVIRONMENT | {"JAX_PLATFORMS": "cpu"} | (many | {"JAX_PROCESS_ID": str(i)} if processes > 1 else {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_process_that_hangs_while_it_beats_ends_all_of_them_and_is_named(processes):
    hanging, host = programs(HANGS, processes), socket.gethostname()
    printed = [process.communicate(timeout=300)[0] for process in hanging]
    assert [process.returncode for process in hanging] == [42] * processes, printed
    where = f"process 0 on {host} is at: step 3; process 1 on {host} is at: step 2"
    where = where if processes == 2 else "this process hangs at: step 2"
    assert not any("Traceback" in text for text in printed), printed
    assert all(f"error: no progress for 8 seconds (config.train.stall_limit); {where}\n" in text for text in printed), (
        printed
    )
    assert all("(most recent call first):" in text for text in printed), printed
    assert 'File "<string>", line 12 in <module>' in printed[-1], printed  # where it hangs


@pytest.mark.parametrize("reason, shown", [("DEADLINE_EXCEEDED: Barrier timed out", True), ("ValueError: 1", False)])
def test_where_a_barrier_timed_out_the_others_show_what_they_do(monkeypatch, reason, shown):
    one = object.__new__(peers.Peers)
    one.names, one._me, lost, dumps = ["process 0", "process 1"], 0, [], []
    monkeypatch.setattr(peers.faulthandler, "dump_traceback", dumps.append)
    monkeypatch.setattr(one, "_lose", lambda message, code: lost.append((message, code)))
    one._end_at_once = one._terminate = None
    one._obey({0: peers.Sign(), 1: peers.Sign(failed=reason)})
    assert lost == [(f"process 1 ended: {reason}", 1)]
    assert len(dumps) == shown


TAKES_STEPS = """
import time
from msd_jax.parallel import distributed, preemption

distributed.start(["program"])
import jax

with distributed.together():
    print("process", distributed.from_all(lambda: jax.process_index()), flush=True)
    with preemption.finishing_steps():
        for step in range(1, 1_000_000):
            distributed.from_all(lambda: step)
            time.sleep(0.1 * jax.process_index())
            if preemption.agreed()[0]:
                print("ended after", step, flush=True)
                preemption.end_preempted("preempted")
"""


@pytest.mark.parametrize("processes, told", [(1, [0]), (2, [0]), (2, [1]), (2, [0, 1])])
def test_all_end_after_the_same_step_whoever_gets_sigterm(processes, told):
    stepping = programs(TAKES_STEPS, processes)
    for process in stepping:
        assert any(line.startswith("process [") for line in process.stdout)
    time.sleep(0.5)
    for process in told:
        stepping[process].send_signal(signal.SIGTERM)
    printed = [process.communicate(timeout=200)[0] for process in stepping]
    assert [process.returncode for process in stepping] == [143] * processes, printed
    assert len({re.search(r"ended after \d+", text)[0] for text in printed}) == 1, printed


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_processes_that_would_compute_different_things_do_not_start(tmp_path):
    for done in by_flags(tmp_path / "run", "", "--config.seed=1"):
        assert done.returncode == 1
        assert "has another config than process 0" in done.stdout and "Traceback" not in done.stdout
    assert not (tmp_path / "run").exists()


def test_an_error_of_one_process_ends_all_and_is_reported_by_all(tmp_path):
    (tmp_path / "file").write_text("")
    begin = time.monotonic()
    results = by_flags(tmp_path / "run", "", "--config.data.batch_size=abc")
    assert time.monotonic() - begin < 30
    for done in results:
        assert done.returncode == 1
        assert re.search(r"error: process 1 on \S+?:? .*flag --config.data.batch_size=abc", done.stdout), done.stdout
        assert "Traceback" not in done.stdout


@pytest.mark.parametrize("flag", ["--processes=2", "--coordinator=127.0.0.1:1", "--process_id=0"])
def test_flags_that_go_together(flag):
    with pytest.raises(ValueError, match=r"--coordinator, --processes and --process_id .* go together"):
        distributed.start(["program", flag])
    distributed._FLAGS.unparse_flags()
    for name in ("coordinator", "processes", "process_id"):
        distributed._FLAGS[name].value = None


ALONE = """
from msd_jax.parallel import distributed, peers

distributed.start(["program"])
assert peers.joined is None
"""


def test_a_kubernetes_pod_outside_any_job_runs_alone():
    """In a process of its own: tests that compile for TPUs leave the variables of a pod's worker in this one."""
    environment = ENVIRONMENT | {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
    done = subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", ALONE], env=environment)
    assert done.returncode == 0


def test_one_process_agrees_with_itself(tmp_path):
    assert distributed.from_first(lambda: {"a": (1,)}) == {"a": (1,)}
    distributed.require_same("x", lambda: 1 / 0)  # not even looked up
    distributed.require_shared(tmp_path / "nowhere")
    assert not any(preemption.agreed())
