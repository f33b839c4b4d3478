"""What the compiler frees is returned to the operating system."""

import subprocess
import sys

# Blocks too small to be mapped one by one, below one that stays: glibc alone would return none of them.
PROGRAM = """
import ctypes, jax
from msd_jax.parallel import host_memory

seen = []
jax.monitoring.register_event_duration_secs_listener(lambda event, seconds, **_: seen.append(event))
jax.jit(lambda x: x + 1)(1.0)
assert host_memory._COMPILED in seen, seen

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
blocks = [libc.malloc(ctypes.c_size_t(100_000)) for _ in range(2000)]
for block in blocks:
    ctypes.memset(block, 1, 100_000)
for block in blocks[:-1]:
    libc.free(ctypes.c_void_p(block))
before = resident()
jax.monitoring.record_event_duration_secs(host_memory._COMPILED, 1.0)
assert resident() > before - 10e6
host_memory.give_back_after_compilations()
host_memory.give_back_after_compilations()
jax.monitoring.record_event_duration_secs(host_memory._COMPILED, 1.0)
print(before - resident())
"""


def test_memory_is_given_back_after_a_compilation():
    if not sys.platform.startswith("linux"):
        return
    output = subprocess.run([sys.executable, "-c", PROGRAM], check=True, stdout=subprocess.PIPE, text=True).stdout
    assert int(output) > 150e6
