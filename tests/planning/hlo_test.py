"""Loops and tuples of hand-written HLO."""

import pytest

from msd_jax.planning.hlo import HloModule, tuple_elements

# Loop counters as TPU programs write them: no known_trip_count. 1, 3, 5, ... below 12.
TPU_LOOP = """
HloModule jit_f

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %p = (s32[]{{:T(128)}}, f32[8]{{0:T(128)}}) parameter(0)
  %i = s32[]{{:T(128)}} get-tuple-element(%p), index=0
  %two = s32[] constant(2)
  %next = s32[]{{:T(128)}} add(%i, %two)
  %x = f32[8]{{0:T(128)}} get-tuple-element(%p), index=1
  %y = f32[8]{{0:T(128)}} negate(%x)
  ROOT %t = (s32[], f32[8]) tuple(%next, %y)
}}

%condition (p.1: (s32[], f32[8])) -> pred[] {{
  %p.1 = (s32[]{{:T(128)}}, f32[8]{{0:T(128)}}) parameter(0)
  %i.1 = s32[]{{:T(128)}} get-tuple-element(%p.1), index=0
  %bound = s32[] constant(12)
  %less = pred[] compare(%i.1, %bound), direction=LT
  %more = pred[] custom-call(%p.1), custom_call_target="anything"
  ROOT %both = pred[] {root}
}}

ENTRY %main (x.1: f32[8]) -> f32[8] {{
  %x.1 = f32[8]{{0:T(128)}} parameter(0)
  %one = s32[] constant(1)
  %start = (s32[], f32[8]) tuple(%one, %x.1)
  %while.1 = (s32[], /*index=1*/f32[8]) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8]{{0:T(128)}} get-tuple-element(%while.1), index=1
}}
"""


def times(text, opcode, **options):
    """How often the only instruction with this opcode runs."""
    (found,) = (x.times for x in HloModule(text, **options).executions() if x.instruction.opcode == opcode)
    return found


@pytest.mark.parametrize("root", ["and(%less, %more)", "and(%more, %less)"])
def test_the_trips_of_a_loop_without_xlas_note_come_from_its_bound(root):
    assert times(TPU_LOOP.format(root=root), "negate", while_trips=99) == 6


@pytest.mark.parametrize("while_trips", [None, 99])
def test_a_bounded_loop_whose_steps_are_unknown_is_an_error(while_trips):
    text = TPU_LOOP.format(root="and(%less, %more)").replace("add(%i, %two)", "multiply(%i, %two)")
    with pytest.raises(ValueError, match=r"no trip count found for the loop while\.1"):
        times(text, "negate", while_trips=while_trips)


def test_a_loop_without_a_bound_and_without_a_given_number_of_trips_is_an_error():
    with pytest.raises(ValueError, match=r"no trip count found for the loop while\.1"):
        times(TPU_LOOP.format(root="custom-call(%more)"), "negate")


# The same loop as jaxlib 0.12 prints it: %p#0 for get-tuple-element(%p), index=0.
TPU_LOOP_0_12 = """
HloModule jit_f

%body (p: (s32[], (pred[], f32[8]))) -> (s32[], (pred[], f32[8])) {
  %p = (s32[]{:T(128)}, (pred[], f32[8]{0:T(128)S(1)})) parameter(0)
  %two = s32[] constant(2)
  %next = s32[]{:T(128)} add(%p#0, %two)
  %y = f32[8]{0:T(128)} negate(%p#1#1)
  %u = (pred[], f32[8]) tuple(%p#1#0, %y)
  ROOT %t = (s32[], (pred[], f32[8])) tuple(%next, %u)
}

%condition (p.1: (s32[], (pred[], f32[8]))) -> pred[] {
  %p.1 = (s32[]{:T(128)}, (pred[], f32[8]{0:T(128)})) parameter(0)
  %bound = s32[] constant(12)
  ROOT %less = pred[] compare(%p.1#0, %bound), direction=LT
}

ENTRY %main (x: (pred[], f32[8])) -> f32[8] {
  %x = (pred[], f32[8]{0:T(128)}) parameter(0)
  %one = s32[] constant(1)
  %start = (s32[], (pred[], f32[8])) tuple(%one, %x)
  %while.1 = (s32[], /*index=1*/(pred[], f32[8])) while(%start), condition=%condition, body=%body
  ROOT %out = f32[8]{0:T(128)} copy(%while.1#1#1)
}
"""


def test_elements_of_tuples_as_jaxlib_0_12_prints_them():
    assert times(TPU_LOOP_0_12, "negate") == 6
    body = HloModule(TPU_LOOP_0_12).computations["body"]
    (element,) = body.operands(body.instructions["y"])
    assert (element.opcode, element.shape) == ("get-tuple-element", "f32[8]{0:T(128)S(1)}")


def test_elements_of_a_tuples_shape():
    shape = "((bf16[2,3]{1,0:T(8,128)(2,1)}), f32[]{:S(2)}, /*index=2*/(s32[4], pred[]), token[])"
    elements = ["(bf16[2,3]{1,0:T(8,128)(2,1)})", "f32[]{:S(2)}", "(s32[4], pred[])", "token[]"]
    assert tuple_elements(shape) == elements


def test_a_loop_without_a_bound_takes_the_given_number_of_trips():
    assert times(TPU_LOOP.format(root="custom-call(%more)"), "negate", while_trips=99) == 99
