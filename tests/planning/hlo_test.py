"""Trip counts of loops, from hand-written HLO."""

import pytest

from msd_jax.planning.hlo import HloModule

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


def test_a_loop_without_a_bound_takes_the_given_number_of_trips():
    assert times(TPU_LOOP.format(root="custom-call(%more)"), "negate", while_trips=99) == 99
