"""The random shapes on which the choice of tiles is confirmed, and the tiles that each may have."""

import dataclasses
import math
import random
from collections.abc import Iterable
from typing import Any

from experiments.simulated.our_tiles import name_of
from experiments.speed.decode.contenders import Contender
from experiments.speed.decode.pools import Pool, lacks_memory
from experiments.speed.decode.programs import Work
from experiments.speed.decode.setup import Setup
from experiments.speed.shapes import LENGTHS, Shape
from mla_jax.hal import HardwareProfile, Problem
from pallas_kernels.hopper.choice import choose_tiles, tiles_for

SEED = 25  # of the shapes for which there are committed measurements
HEADS = (8, 16, 32, 64, 128)  # half of the shapes have these, the others any number between
MOST_TOKENS = 1 << 22  # KV tokens of a batch, 4.8 GB


def drawn(seed: int, count: int) -> list[Shape]:
    """Returns so many random shapes, the same for the same seed: decode steps over bf16."""
    draw = random.Random(seed)
    found: dict[Shape, None] = {}
    while len(found) < count:
        heads = draw.choice(HEADS) if draw.random() < 0.5 else draw.randint(HEADS[0], HEADS[-1])
        batch, kv_len = _log_uniform(draw, 1, 512), _log_uniform(draw, 64, 65536)
        s_q, lengths = draw.choice((1, 2)), draw.choice(LENGTHS)
        shape = Shape(batch, "bf16", heads, s_q, 64, lengths, kv_len)
        if sum(shape.seq_lens) <= MOST_TOKENS:
            found[shape] = None
    return list(found)


def _log_uniform(draw: random.Random, least: int, most: int) -> int:
    return round(math.exp(draw.uniform(math.log(least), math.log(most))))


@dataclasses.dataclass(frozen=True)
class Tilings:
    """The legal tiles of a shape, by name, with the simulated microseconds of each.

    chosen: those that `plan_decode` takes. source: why, as in `TileChoice`.
    """

    configs: dict[str, Any]
    simulated: dict[str, float]
    chosen: str
    source: str

    @property
    def fastest(self) -> str:
        """The ones with the least simulated time."""
        return min(self.simulated, key=lambda name: self.simulated[name])

    @staticmethod
    def of(shape: Shape, profile: HardwareProfile, capacity: int) -> "Tilings":
        """Returns the tiles of a shape whose block tables reach `capacity` tokens."""
        choice = choose_tiles(profile, Problem(shape.seq_lens, shape.heads, shape.s_q))
        timed = {
            name_of(t): (t, s) for t, s in ((choice.tiles, choice.seconds), *choice.runners_up)
        }
        rows = shape.heads * shape.s_q
        sizes: dict[str, Any] = {"batch": shape.batch, "capacity": capacity, "profile": profile}
        tiles, source = tiles_for(rows, **sizes)
        configs = {name: config for name, (config, _) in timed.items()}
        simulated = {name: seconds * 1e6 for name, (_, seconds) in timed.items()}
        return Tilings(configs | {name_of(tiles): tiles}, simulated, name_of(tiles), source)

    def contenders(self) -> list[Contender]:
        """Returns who is timed: the chosen tiles, then the others by their simulated times."""
        options = (("implementation", "hopper"),)
        others = sorted(self.simulated, key=lambda name: self.simulated[name])
        names = dict.fromkeys([self.chosen, *others])
        return [Contender(name, options, tiles=self.configs[name]) for name in names]


def capacities(shapes: Iterable[Shape], setup: Setup) -> dict[Shape, int]:
    """Returns the tokens of a block table of each shape that fits here, as `Runner` makes it."""
    together: dict[int, list[Shape]] = {}
    for shape in shapes:
        if lacks_memory(shape, setup) is None:
            together.setdefault(shape.batch, []).append(shape)
    pools = {batch: Pool.of(rows, setup) for batch, rows in together.items()}
    return {
        row: Work(row, pools[batch], setup).capacity
        for batch, rows in together.items()
        for row in rows
    }
