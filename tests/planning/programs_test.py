"""The programs of a run, and what is in memory beside each."""

import re

import jax
import jax.numpy as jnp
import pytest

from msd_jax.parallel import sharding
from msd_jax.planning import programs
from msd_jax.planning.architecture import abstract_model, read_sizes
from msd_jax.planning.collectives import find_collectives
from msd_jax.planning.hlo import HloModule
from tests.planning.conftest import needs_libtpu


def model_of(config, mesh):
    return abstract_model(config, read_sizes(config.model.path)[0], mesh)


def test_bytes_per_device_follow_the_sharding():
    mesh = sharding.make_mesh(2, 2, 2)
    both = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "tensor"))
    split = jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=both)
    whole = jax.ShapeDtypeStruct((3,), jnp.bfloat16, sharding=sharding.replicated(mesh))
    assert programs.bytes_per_device({"a": split, "b": [whole]}) == 4 * 3 * 4 + 3 * 2


@pytest.mark.parametrize(
    "values, names",
    [
        ({"eval.path": ""}, ["train", "update", "relayout", "rollout"]),
        ({"eval.path": "", "rollout.policy": "off_policy"}, ["train", "update", "relayout", "teacher rollout"]),
        ({"rollout.policy": "mixed"}, ["train", "update", "relayout", "rollout", "teacher rollout", "evaluation"]),
    ],
)
def test_the_programs_of_a_run(smoke, values, names):
    config, mesh = smoke(**values), sharding.make_mesh(1, 4, 2)
    assert [program.name for program in programs.run_programs(config, model_of(config, mesh), mesh)] == names


def test_the_whole_train_state_is_beside_a_rollout(smoke):
    config, mesh = smoke(), sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    model = model_of(config, mesh)
    weights = sum(leaf.size for leaf in jax.tree.leaves(model.abstract)) * 4
    # Matrices of a frozen teacher are in the compute dtype, bfloat16; the embedding and norms are not.
    wide = [leaf for name, leaf in model.abstract.items() if name in ("embedding", "final_norm")]
    wide += [leaf for name, leaf in model.abstract["layers"].items() if "norm" in name]
    teacher = weights / 2 + sum(leaf.size for leaf in wide) * 2
    counts = 3 * 4  # steps, skipped steps and the optimizer's own count
    resident = {program.name: program.resident_bytes for program in programs.run_programs(config, model, mesh)}
    moments = 2 * weights
    assert moments <= resident["train"] <= moments + 2 * counts  # the rest of the state is its argument
    assert resident["update"] == 0
    state = 3 * weights + teacher  # the student, two moments and the teacher
    assert state + counts <= resident["rollout"] <= state + 2 * counts
    assert resident["relayout"] == resident["rollout"] - weights


@pytest.mark.parametrize("values", [{}, {"model.lora.rank": 4}, {"teacher.kind": "live"}])
def test_the_programs_lower_for_a_mesh_and_are_those_of_training(smoke, values):
    config, mesh = smoke(**values), sharding.make_mesh(1, 4, 2)
    planned = programs.run_programs(config, model_of(config, mesh), mesh)
    texts = {program.name: program.trace().lower().as_text() for program in planned}
    assert "jit_gradient" in texts["train"] and "jit_update" in texts["update"]
    prompts, response = config.prompts, config.rollout.max_new_tokens
    for limit in (prompts.student_limit, prompts.teacher_limit):
        columns = -(-(limit + response - 1) // 16) * 16
        assert f"tensor<{config.data.batch_size}x{columns}xi32>" in texts["train"]
    assert f"tensor<{config.data.batch_size}x{response}xi32>" in texts["rollout"]


def test_a_batch_that_does_not_divide_is_refused(smoke):
    config, mesh = smoke(**{"train.micro_batches": 2}), sharding.make_mesh(1, 8, 1)
    with pytest.raises(ValueError, match="gives 4 rows, which do not divide over 8 devices"):
        list(programs.run_programs(config, model_of(config, mesh), mesh))


@pytest.mark.parametrize(("key", "quantised"), [("rollout", {"relayout", "rollout"}), ("eval", {"evaluation"})])
def test_int8_weights_are_planned_where_they_are_asked_for(smoke, key, quantised):
    config, mesh = smoke(**{f"{key}.weights": "int8"}), sharding.make_mesh(1, 4, 2)
    planned = list(programs.run_programs(config, model_of(config, mesh), mesh))
    texts = {program.name: program.trace().lower().as_text() for program in planned}
    assert {name for name, text in texts.items() if "xi8>" in text} == quantised


@needs_libtpu
def test_the_decode_loop_for_tpus_reads_int8(smoke, tpu_slice):
    """And no wider copy of a matrix that was made before it."""
    config = smoke(**{"rollout.weights": "int8"})
    mesh = sharding.make_mesh(1, 2, 2, devices=tpu_slice("v5e:2x2"))
    model = model_of(config, mesh)
    (rollout,) = (x for x in programs.run_programs(config, model, mesh) if x.name == "rollout")
    module = HloModule(rollout.trace().lower().compile().as_text(), rollout.while_trips)
    loops = " ".join(x.instruction.shape for x in module.executions() if x.instruction.opcode == "while")
    layers, ffw = model.config.layers, model.config.ffw // 2
    carried = re.findall(rf"(\w+)\[{layers},(?:\d\d+,{ffw}|{ffw},\d\d+)\]", loops)
    assert carried and set(carried) == {"s8"}


@needs_libtpu
@pytest.mark.parametrize("sizes", [(1, 4, 1), (1, 2, 2)])
def test_the_decode_loop_for_tpus_gathers_no_weights(smoke, sizes, tpu_slice):
    config = smoke()
    mesh = sharding.make_mesh(*sizes, devices=tpu_slice("v5e:2x2"))
    model = model_of(config, mesh)
    (rollout,) = (x for x in programs.run_programs(config, model, mesh) if x.name == "rollout")
    module = HloModule(rollout.trace().lower().compile().as_text(), rollout.while_trips)
    assert any(x.instruction.opcode == "while" for x in module.executions())  # it decodes in a loop
    smallest = min(leaf.size for leaf in jax.tree.leaves(model.abstract) if leaf.ndim > 2) // model.config.layers
    gathers = [x for x in find_collectives(module) if x.kind == "all-gather" and x.times > 1]
    assert all(x.operand_bytes * x.group_size < smallest for x in gathers), gathers
    summed = [x for x in find_collectives(module) if x.kind == "all-reduce" and f",{model.config.width}]" in x.shape]
    assert all(x.shape.startswith("bf16[") for x in summed), summed  # not widened to float32 before they cross chips
    assert len(summed) >= (4 if sizes[2] > 1 else 0)  # of attention and feed-forward, of the prompts and of each token
