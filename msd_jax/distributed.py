"""One run over many processes: what a process might see otherwise than its peers, process 0 looks up for all."""

import json
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


def is_first() -> bool:
    """Whether this is process 0, which alone prints and writes files (but for checkpoints)."""
    return jax.process_index() == 0


def from_first(look_up: Callable[[], Any]) -> Any:
    """What `look_up` gives on process 0 (a JSON value), on every process."""
    if jax.process_count() == 1:
        return look_up()
    data = json.dumps(look_up()).encode() if is_first() else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    text_S = np.frombuffer(data or bytes(size), np.uint8)
    return json.loads(multihost_utils.broadcast_one_to_all(text_S).tobytes())
