"""The shape of a run's packs: how many rows of how many tokens compute its batches fastest."""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import ml_collections
import numpy as np
from jax.sharding import Mesh

from msd_jax.data.prompts import Example
from msd_jax.models import attention, pretrained
from msd_jax.parallel import padding, sharding
from msd_jax.training.packing import Beginnings, Shape, beginning_lengths, fewest, place
from msd_jax.training.train_step import check_batch, reads_teacher

_SHARED = 16  # tokens that a beginning has at least
_PASSES = (4, 1)  # over a student's token (forward, the same recomputed, and backward, which takes two) and a teacher's


class Costs(NamedTuple):
    """What decides between shapes, beside the number of tokens.

    Attributes:
      multiple: of which rows have their length.
      pack: of each pack, in student's tokens of a part: all weights are read, and a gradient is added.
      attention: of a pair of tokens, relative to as many operations of the other matrix products.
    """

    multiple: int
    pack: int
    attention: float

    def of(self, shape: Shape, width: int) -> float:
        """The cost of a pack, for a model of this width."""
        pairs = self.attention / (6 * width)  # a layer's other products are about 24 D^2 a token
        per_row = sum(passes * length * (1 + pairs * length) for passes, length in zip(_PASSES, shape.lengths))
        return shape.rows * per_row + _PASSES[0] * self.pack


# By platform. Attention on CPUs is several passes over [T, T]; TPUs gather the weights, and splash takes rows of 128 n.
COSTS = {"cpu": Costs(16, 64, 1.5), "gpu": Costs(64, 512, 1.0), "tpu": Costs(128, 1024, 1.0)}


def pack_shape(
    config: ml_collections.ConfigDict,
    model: pretrained.Architecture,
    mesh: Mesh,
    examples: Iterable[Example] | None = None,
) -> Shape:
    """A micro-batch's rows at their limits or, for `examples`, what computes them fastest and is no larger.

    Raises:
      UserError: the rows of a micro-batch do not divide over the devices.
    """
    check_batch(config, mesh)
    parts, R, roles = sharding.batch_shards(mesh), config.rollout.max_new_tokens, 2 if reads_teacher(config) else 1
    rows, costs = config.data.batch_size // config.train.micro_batches // parts, COSTS[sharding.platform(mesh)]
    if examples is None:
        limits = np.array([config.prompts.student_limit, config.prompts.teacher_limit][:roles])
        return Shape(parts, rows, _rounded(limits + R - 1, costs))
    prompts = [(example.student_ids, example.teacher_ids)[:roles] for example in examples]
    languages = [example.language for example in examples]
    beginning_of = find_beginnings(prompts, languages) if attention.shares_beginnings(mesh) else {}
    beginnings = tuple(sorted(set(beginning_of.values()), key=lambda group: (-sum(map(len, group)), group)))
    index = {language: beginnings.index(group) for language, group in beginning_of.items()}
    usual = min(config.train.response_tokens, R)
    return choose(
        np.array([[len(ids) for ids in prompt_K] for prompt_K in prompts]),
        R,
        usual,
        batch_size=config.data.batch_size,
        parts=parts,
        most_rows=rows,
        costs=costs,
        width=model.config.width,
        beginnings=beginnings,
        group_N=[index.get(language, -1) for language in languages],
    )


def find_beginnings(
    prompts: Sequence[tuple[np.ndarray, ...]], languages: Sequence[str]
) -> dict[str, tuple[tuple[int, ...], ...]]:
    """Language -> what its prompts begin with in each role, where that is long in any."""
    of_language: dict[str, list[tuple[np.ndarray, ...]]] = {}
    for language, prompt_K in zip(languages, prompts):
        of_language.setdefault(language, []).append(prompt_K)
    found = {
        language: tuple(tuple(role[0][: padding.common_prefix(role)].tolist()) for role in zip(*own))
        for language, own in of_language.items()
    }
    long = {language: group for language, group in found.items() if max(map(len, group)) >= _SHARED}
    return dict([*long.items()][: attention.BEGINNINGS - 2])


def choose(
    prompt_NxK: np.ndarray,
    response: int,
    usual: int,
    *,
    batch_size: int,
    parts: int,
    most_rows: int,
    costs: Costs,
    width: int,
    beginnings: Beginnings = (),
    group_N: Sequence[int] | None = None,
) -> Shape:
    """The shape that computes batches of these prompts fastest, by trial on random ones.

    Args:
      prompt_NxK: tokens of the prompts of each of K roles, those of beginnings included.
      response: the most tokens of a response.
      usual: its mean; 0 where it is not known.
      batch_size: B.
      parts: that rows are split into.
      most_rows: of each part, as long as the longest sequence, that a pack may be as large as: it must fit in memory.
      costs: of the platform.
      width: D of the model.
      beginnings: that sequences in the same row share.
      group_N: of each prompt, which of them; -1 for none. None: none has any.
    """
    groups = np.full(len(prompt_NxK), -1) if group_N is None else np.asarray(group_N)
    drawn = list(_batches(prompt_NxK, response, usual, batch_size))
    batches = [(prompt_NxK[chosen_B] + reply_B[:, None], groups[chosen_B]) for chosen_B, reply_B in drawn]
    longest_K, shared_GxK = prompt_NxK.max(axis=0) + response - 1, beginning_lengths(beginnings, prompt_NxK.shape[1])
    shared_K = shared_GxK.max(axis=0)  # in a row once; what its sequences have for themselves fills it
    mean_K = np.concatenate([length_BxK - shared_GxK[group_B] for length_BxK, group_B in batches]).mean(axis=0)
    filling_alike_K = ((longest_K - shared_K) / mean_K).max() * mean_K

    room_K = most_rows * np.array(_rounded(longest_K, costs))
    stretched = [2.0 ** (eighths / 8) for eighths in range(17)]
    wanted = [wanted_K for by in stretched for wanted_K in (by * longest_K, shared_K + by * filling_alike_K)]
    shapes = {
        Shape(parts, rows, lengths, beginnings)
        for rows in {round(most_rows / 2 ** (eighths / 8)) or 1 for eighths in range(8 * most_rows.bit_length())}
        for lengths in (_rounded(wanted_K, costs) for wanted_K in wanted)
        if (rows * np.array(lengths) <= room_K).all()
    }
    # Placing batches takes long: those shapes come first that could be the best, each until it cannot be any more.
    packs_of = {shape: [fewest(length_BxK, shape, group_B) for length_BxK, group_B in batches] for shape in shapes}
    at_least = {shape: costs.of(shape, width) * sum(packs) for shape, packs in packs_of.items()}
    ranked = sorted(shapes, key=lambda shape: (at_least[shape], shape.rows, shape.lengths))
    best, least = ranked[0], np.inf
    for shape in ranked:
        if at_least[shape] >= least:
            break
        packs = packs_of[shape]
        for i, (length_BxK, group_B) in enumerate(batches):
            packs[i] = 1 + max(at.pack for at in place(length_BxK, shape, group_B))
            if costs.of(shape, width) * sum(packs) >= least:
                break
        else:
            best, least = shape, costs.of(shape, width) * sum(packs)
    return best


def _batches(
    prompt_NxK: np.ndarray, response: int, usual: int, batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(which prompts [B], tokens read of their replies [B]) of random batches; the same ones at each call.

    Where the usual length of a reply is not known, replies are short in some of the batches and long in others.
    """
    rng, count = np.random.default_rng(0), 32
    for share in [usual / response] * count if usual else np.linspace(0.1, 0.9, count):
        chosen_B = rng.integers(len(prompt_NxK), size=batch_size)
        replies_B = np.ceil(response * rng.beta(2 * share, 2 * max(1 - share, 1e-3), batch_size)).astype(int)
        yield chosen_B, replies_B - 1  # nothing is predicted after the last token


def _rounded(length_K: np.ndarray, costs: Costs) -> tuple[int, ...]:
    return tuple((-(-np.ceil(length_K) // costs.multiple) * costs.multiple).astype(int).tolist())
