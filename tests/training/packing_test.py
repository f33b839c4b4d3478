"""Packs: every sequence is in them once, whole and apart from its neighbours, whatever shares its row."""

import dataclasses
import types

import jax
import numpy as np
import pytest
from msd_jax.configs import default

from msd_jax.data.prompts import Example
from msd_jax.models import config as model_config
from msd_jax.models import decoder, forward
from msd_jax.models.attention import BEGINNINGS
from msd_jax.parallel import sharding
from msd_jax.training import pack_shape, packing, train_step
from tests.conftest import LLAMA
from tests.training.train_step_test import make_batch, make_batch_alike

SHAPES = [
    packing.Shape(parts=1, rows=8, lengths=(10, 13)),
    packing.Shape(parts=1, rows=1, lengths=(40, 64)),
    packing.Shape(parts=4, rows=2, lengths=(24, 17)),
    packing.Shape(parts=2, rows=3, lengths=(11,)),
]

POD = {"batch_size": 64, "parts": 1, "most_rows": 16, "costs": pack_shape.COSTS["tpu"], "width": 4096}


def lengths_of(batch, roles):
    both = np.stack([batch.student_length_B, batch.teacher_length_B][:roles], axis=1)
    return (both + batch.response_length_B[:, None] - 1)[batch.response_length_B > 0]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_places_do_not_overlap_and_hold_every_sequence(rng, shape):
    length_NxK = lengths_of(make_batch(rng, B=40), len(shape.lengths))
    places = packing.place(length_NxK, shape)
    for role, limit in enumerate(shape.lengths):
        rows = {}
        for at, length in zip(places, length_NxK[:, role]):
            assert 0 <= at.part < shape.parts and 0 <= at.rows[role] < shape.rows
            rows.setdefault((at.pack, at.part, at.rows[role]), []).append((at.spans[role].start, int(length)))
            assert at.spans[role].stop - at.spans[role].start == length
        for spans in rows.values():
            ends = [0, *(begin + length for begin, length in sorted(spans))]
            assert ends[:-1] == [begin for begin, _ in sorted(spans)] and ends[-1] <= limit
    assert {at.pack for at in places} == set(range(1 + max(at.pack for at in places)))


def test_packs_mix_long_and_short_sequences(rng):
    """A long reply is more of what the student reads than of what the teacher does, which packs of them leave empty."""
    replies = np.ceil(256 * rng.beta(0.6, 1.4, 256)).astype(int)
    length_NxK = np.array([40, 150]) + rng.integers(-15, 15, (256, 1)) + replies[:, None]
    shape = packing.Shape(parts=1, rows=2, lengths=(560, 1120))
    needed_at_least = (length_NxK.sum(axis=0) / (2 * np.array(shape.lengths))).max()
    assert len({at.pack for at in packing.place(length_NxK, shape)}) < 1.08 * needed_at_least  # first-fit: 1.12 to 1.16


def test_there_are_never_more_packs_than_rows_of_full_length_need(rng):
    """So micro_batches bounds the packs of a step whose rows are as long as the limits: the step that is planned."""
    for _ in range(20):
        batch = make_batch(rng, B=32, P=20, Q=30, R=12, lengths=rng.integers(0, 13, 32))
        packs = packing.pack(batch, packing.Shape(parts=2, rows=4, lengths=(31, 41)))
        assert len(packs) <= 4


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_each_response_token_is_predicted_by_what_precedes_it_in_its_sequence(rng, shape):
    """Read back from the arrays alone: the segment up to the place that predicts a token is its prompt and response."""
    batch = make_batch(rng, B=24, lengths=rng.integers(0, 6, 24))
    if len(shape.lengths) == 1:
        batch = batch._replace(teacher_prompt_BxP=None, teacher_length_B=None)
    expected, found = [], []
    for row, count in enumerate(batch.response_length_B):
        student = batch.student_prompt_BxP[row, -batch.student_length_B[row] :]
        response = batch.response_BxR[row, :count].tolist()
        expected += [(*student.tolist(), *response[: t + 1]) for t in range(count)]
    for pack in packing.pack(batch, shape):
        for part in range(shape.parts):
            count = pack.mask_SxN[part].sum()
            assert pack.mask_SxN[part, :count].all()
            for n in range(count):
                read = []
                for rows in filter(None, (pack.student, pack.teacher)):
                    row, column = divmod(int(rows.predicts_SxN[part, n]), rows.token_BxT.shape[1])
                    row += part * shape.rows
                    own = rows.segment_BxT[row] == rows.segment_BxT[row, column]
                    assert rows.segment_BxT[row, column] > 0
                    np.testing.assert_array_equal(rows.position_BxT[row, own], np.arange(own.sum()))
                    position = rows.position_BxT[row, column]
                    read.append(tuple(rows.token_BxT[row, own][: position + 1].tolist()))
                found.append((*read[0], int(pack.response_SxN[part, n])))
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("window", [None, 3])
def test_hidden_states_are_those_of_each_sequence_alone(rng, window):
    """Also where attention is within a window, which reaches into the row's sequence before."""
    config = model_config.from_dict(LLAMA | ({"sliding_window": window, "model_type": "mistral"} if window else {}))
    config = dataclasses.replace(config, longest=20)  # of a sequence: a row of several may be longer
    graphdef, params = decoder.init(config, jax.random.key(0))
    batch = make_batch(rng, B=12)
    (pack,) = packing.pack(batch, packing.Shape(parts=2, rows=2, lengths=(60, 80)))
    alone = forward.response_hidden(
        graphdef, params, *(batch.student_prompt_BxP, batch.student_length_B),
        *(batch.response_BxR, batch.response_length_B),
    )  # fmt: skip
    mask = forward.response_mask(batch.response_length_B, batch.response_BxR.shape[1])
    packed, _ = forward.packed_hidden_and_head(graphdef, params, pack.student)
    alone_NxD, packed_NxD = np.asarray(alone)[np.asarray(mask)], np.asarray(packed)[pack.mask_SxN.ravel()]
    distance_NxN = np.abs(packed_NxD[:, None] - alone_NxD).max(axis=2)
    assert distance_NxN.min(axis=1).max() < 1e-5
    assert sorted(distance_NxN.argmin(axis=1)) == list(range(len(alone_NxD)))  # each once


@pytest.mark.parametrize("sizes", [(1, 2, (60, 80)), (2, 3, (40, 60))])
def test_a_beginning_that_prompts_share_is_once_in_a_row(rng, sizes):
    """Every sequence can be read back: its own segment, after the segment that is its remainder by BEGINNINGS."""
    batch, beginnings = make_batch_alike(rng, B=40)
    plain, shape = packing.Shape(*sizes), packing.Shape(*sizes, beginnings)
    packs = packing.pack(batch, shape)
    assert len(packs) < len(packing.pack(batch, plain))
    for name in ("student", "teacher"):
        prompt_BxP, length_B = (getattr(batch, f"{name}_{what}") for what in ("prompt_BxP", "length_B"))
        expected = [
            [*prompt[-length:].tolist(), *response[: count - 1].tolist()]
            for prompt, length, response, count in zip(
                prompt_BxP, length_B, batch.response_BxR, batch.response_length_B
            )
            if count
        ]
        found, shared = [], 0
        for rows in (getattr(pack, name) for pack in packs):
            for token_T, position_T, segment_T in zip(rows.token_BxT, rows.position_BxT, rows.segment_BxT):
                assert (segment_T >= 0).all()
                own = {int(s) for s in segment_T if s >= BEGINNINGS}
                heads = {int(s) for s in segment_T if 0 < s < BEGINNINGS}
                assert heads <= {s % BEGINNINGS for s in own}
                for segment in own:
                    read = (segment_T == segment) | (segment_T == segment % BEGINNINGS)
                    np.testing.assert_array_equal(position_T[read], np.arange(read.sum()))
                    found.append(token_T[read].tolist())
                    shared += int((segment_T == segment % BEGINNINGS).sum())
        assert sorted(found) == sorted(expected) and shared > 0


@pytest.mark.parametrize("window", [None, 9])
def test_what_shares_a_beginning_has_the_hidden_states_of_each_sequence_alone(rng, window):
    config = model_config.from_dict(LLAMA | ({"sliding_window": window, "model_type": "mistral"} if window else {}))
    graphdef, params = decoder.init(config, jax.random.key(0))
    batch, beginnings = make_batch_alike(rng)
    (pack,) = packing.pack(batch, packing.Shape(2, 2, (80, 128), beginnings))
    assert (pack.teacher.segment_BxT > 0).sum() < lengths_of(batch, 2)[:, 1].sum() - 40
    response = batch.response_BxR, batch.response_length_B
    mask = np.asarray(forward.response_mask(batch.response_length_B, batch.response_BxR.shape[1]))
    for rows, *prompt in (
        (pack.student, batch.student_prompt_BxP, batch.student_length_B),
        (pack.teacher, batch.teacher_prompt_BxP, batch.teacher_length_B),
    ):
        alone_NxD = np.asarray(forward.response_hidden(graphdef, params, *prompt, *response))[mask]
        packed, _ = forward.packed_hidden_and_head(graphdef, params, rows)
        packed_NxD = np.asarray(packed)[pack.mask_SxN.ravel()]
        distance_NxN = np.abs(packed_NxD[:, None] - alone_NxD).max(axis=2)
        assert distance_NxN.min(axis=1).max() < 1e-5
        assert sorted(distance_NxN.argmin(axis=1)) == list(range(len(alone_NxD)))


def example(language, student, teacher):
    return Example("q", language, None, np.array(student, np.int32), np.array(teacher, np.int32))


SWAHILI = tuple(range(100, 130))
EXAMPLES = [example("sw", [1, 2, 10 + i], [*SWAHILI, 40 + i]) for i in range(3)]
EXAMPLES += [example("bn", [1, 2, 3], range(200, 220))]  # one prompt, which is all its beginning
EXAMPLES += [example("en", [1, 2, 10 + i], [7, 8, 50 + i]) for i in range(3)]  # too short


def test_beginnings_are_those_of_each_language_and_leave_a_token():
    prompts = [(e.student_ids, e.teacher_ids) for e in EXAMPLES]
    languages = [e.language for e in EXAMPLES]
    found = pack_shape.find_beginnings(prompts, languages)
    assert found == {"sw": ((1, 2), SWAHILI), "bn": ((1, 2), tuple(range(200, 219)))}
    assert pack_shape.find_beginnings([prompt[:1] for prompt in prompts], languages) == {}
    assert [packing.group_of(prompt, tuple(found.values())) for prompt in prompts] == [0, 0, 0, 1, -1, -1, -1]
    assert packing.group_of((np.array(SWAHILI),), ((SWAHILI,),)) == -1  # nothing would be left to predict from


@pytest.mark.parametrize("platform, shared", [("cpu", 2), ("gpu", 2), ("tpu", 0)])
def test_rows_hold_beginnings_where_the_kernel_can_tell_them_apart(platform, shared, monkeypatch):
    config = default.get_config()
    config.data.batch_size, config.rollout.max_new_tokens = 8, 8
    monkeypatch.setattr(sharding, "platform", lambda mesh: platform)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model = types.SimpleNamespace(config=model_config.from_dict(LLAMA))
    shape = pack_shape.pack_shape(config, model, mesh, EXAMPLES)
    assert len(shape.beginnings) == shared
    if not shared:
        kept = packing.Shape(1, 1, (64, 64), ((SWAHILI, SWAHILI),))
        with pytest.raises(AssertionError, match="splash would leave the beginnings out"):
            train_step.TrainStep(config, model, mesh, None, kept)


def test_a_batch_without_response_tokens_has_no_pack(rng):
    shape = packing.Shape(parts=1, rows=2, lengths=(12, 16))
    assert packing.pack(make_batch(rng, lengths=np.zeros(8, int)), shape) == []


def prompts(rng, count=200):
    return np.stack([rng.integers(30, 90, count), rng.integers(120, 180, count)], axis=1)


@pytest.mark.parametrize("usual", [0, 20, 64])
def test_the_shape_holds_the_longest_sequence_and_no_more_than_memory(rng, usual):
    lengths, most = prompts(rng), {"batch_size": 32, "parts": 2, "most_rows": 8, "width": 512}
    shape = pack_shape.choose(lengths, 64, usual, **most, costs=pack_shape.COSTS["cpu"])
    longest = lengths.max(axis=0) + 63
    assert (np.array(shape.lengths) >= longest).all() and shape.parts == 2
    assert (shape.rows * np.array(shape.lengths) <= 8 * (longest + 16)).all()
    assert all(length % 16 == 0 for length in shape.lengths)
    assert shape == pack_shape.choose(lengths, 64, usual, **most, costs=pack_shape.COSTS["cpu"])  # as on a resume


def test_a_known_length_of_replies_gives_a_better_shape_for_them(rng):
    lengths = prompts(rng)

    def columns(usual):
        shape = pack_shape.choose(lengths, 512, usual, **POD)
        drawn = lengths[rng.integers(200, size=64)] + 511
        return shape.rows * sum(shape.lengths) * len({at.pack for at in packing.place(drawn, shape)})

    assert columns(512) <= columns(0)


def test_mixed_replies_take_less_than_half_of_what_full_rows_would(rng):
    """A batch padded to its longest reply computes 512 columns for each; most replies end much earlier."""
    lengths = prompts(rng)
    shape = pack_shape.choose(lengths, 512, 150, **POD)
    replies = np.clip(rng.lognormal(np.log(115), 0.7, 64), 1, 512).astype(int)
    packs = len({at.pack for at in packing.place(lengths[:64] + replies[:, None] - 1, shape)})
    full = 64 * (lengths.max(axis=0) + 511).sum()
    assert packs * shape.rows * sum(shape.lengths) < 0.5 * full
