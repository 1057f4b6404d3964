"""YaRN context extension (arXiv 2309.00071) as DeepSeek configures it."""

import dataclasses
import math

from mla_jax import checks
from mla_jax.config.fields import bounded_number, positive_int, store_field


@dataclasses.dataclass(frozen=True)
class YarnScaling:
    """YaRN context extension as DeepSeek configures it.

    `factor` is the new context length over `original_max_position_embeddings`. Channel pairs that
    turn more than `beta_fast` times within the original length keep their frequency. Pairs that
    turn less than `beta_slow` times are slowed down by `factor`. Between them is a linear ramp,
    whose ends are rounded outwards to whole pairs if `truncate`. `mscale` and `mscale_all_dim`
    determine the two temperatures below. None and 0 mean that they are not given, which differs
    from 1.

    Raises TypeError or ValueError that names the invalid field.
    """

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        for name, kind, low, high in (
            ("factor", "a positive number", 1.0, 1e6),
            ("beta_fast", "a positive number", 1e-3, 1e6),
            ("beta_slow", "a positive number", 1e-3, 1e6),
            ("mscale", "a number or null", 0.0, 100.0),  # published models have 0.7 to 1
            ("mscale_all_dim", "a number or null", 0.0, 100.0),
            ("attention_factor", "a number or null", 1e-3, 1e3),
        ):
            value = getattr(self, name)
            if value is not None or not kind.endswith("null"):
                store_field(
                    self, name, bounded_number(f"rope_scaling.{name}", value, kind, low, high)
                )
        original = self.original_max_position_embeddings
        name = "original_max_position_embeddings"
        store_field(self, name, positive_int(f"rope_scaling.{name}", original))
        store_field(self, "truncate", checks.require_bool("rope_scaling.truncate", self.truncate))
        if self.beta_fast < self.beta_slow:
            raise ValueError(
                f"rope_scaling.beta_fast must be at least beta_slow = {self.beta_slow}, "
                f"got {self.beta_fast}"
            )

    @property
    def rotation_scale(self) -> float:
        """The factor of the rotated (rope) part of q and of k."""
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(
                self.factor, self.mscale_all_dim
            )
        return yarn_mscale(self.factor)

    @property
    def softmax_mscale(self) -> float:
        """The factor of q and of k in the softmax scale, which is multiplied by its square."""
        return yarn_mscale(self.factor, self.mscale_all_dim) if self.mscale_all_dim else 1.0


def yarn_mscale(factor: float, mscale: float = 1.0) -> float:
    """Returns YaRN's temperature 0.1 * mscale * ln(factor) + 1, or 1 for a factor up to 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
