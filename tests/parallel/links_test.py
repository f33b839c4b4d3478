"""The check before a long run: what it measures, and which machine it names."""

import os
import re
import subprocess
import sys

import pytest

from msd_jax.parallel import links
from tests.conftest import REPOSITORY


def test_devices_that_work_have_no_faults():
    stages: list[str] = []
    found = links.measure(1, stages.append)
    assert list(found.devices.values()) == [8] and not found.neighbours
    assert found.all_reduce > 0 and all(rate > 0 for rate in found.flops.values())
    assert not found.faults
    assert stages[-1] == "an all-reduce over all devices"


@pytest.mark.parametrize("count, edges", [(1, []), (2, [(0, 1)]), (3, [(0, 1), (1, 2), (2, 0)])])
def test_each_machine_has_two_neighbours(count, edges):
    assert list(links.pairs(count)) == edges


def test_the_machine_that_is_slow_with_both_neighbours_is_named():
    true = {"a": 1.0, "b": 1.0, "c": 0.1, "d": 1.0, "e": 1.0}  # a pair is as fast as its slower machine
    hosts, rates = list(true), dict.fromkeys(true, 0.0)
    for one, other in links.pairs(len(hosts)):
        speed = 1e11 * min(true[hosts[one]], true[hosts[other]])
        for host in (hosts[one], hosts[other]):
            rates[host] = max(rates[host], speed)
    assert list(links.slow("all-reduce", "B/s", rates)) == ["c: all-reduce at 10.0 GB/s, the median machine has 100.0"]


@pytest.mark.parametrize("bad", [float("nan"), 3.0])
def test_the_machine_that_multiplies_wrongly_is_named(bad):
    assert not list(links.wrong({"a": [1.0, 1.0001], "b": [1.0, 1.0]}))
    assert list(links.wrong({"a": [1.0, 1.0], "b": [1.0, bad], "c": [1.0, 1.0]})) == ["b: a device multiplies wrongly"]


HANGS = """
import runpy, sys, time

from msd_jax.parallel import links

links.measure = lambda mebibytes, stage: (stage("an all-reduce over all devices"), time.sleep(100))
sys.argv = ["check", "--seconds=1"]
runpy.run_module("msd_jax.check", run_name="__main__")
"""


def test_the_command_names_the_machine_that_hangs():
    command = [sys.executable, "-c", HANGS]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ, capture_output=True, text=True, timeout=90)
    assert done.returncode == 1
    assert re.fullmatch(r"error: \S+: an all-reduce over all devices did not end within 1 seconds\n", done.stderr)
