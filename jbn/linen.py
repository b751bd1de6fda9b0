"""Batch normalization as Flax Linen modules: Flax's attributes and variables, jbn's arithmetic."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen.dtypes import canonicalize_dtype
from jax.typing import ArrayLike

from jbn import _flax
from jbn._arguments import AxisName, IndexGroups
from jbn._complex import is_complex
from jbn._core.batch_renorm import PUBLISHED_D_MAX, PUBLISHED_R_MAX
from jbn._core.state import Params, State
from jbn.momentum import Schedule


class BatchNorm(nn.Module):
    """`flax.linen.BatchNorm` by its own names, with the arithmetic and the options of `jbn.batch_norm`.

    out = activation((x - mean) / sqrt(var + epsilon) * scale + bias + shortcut)

    Variables are those of Flax, float32 `mean` and `var` in `batch_stats`, `scale` and `bias` in `params`, so that
    checkpoints of either load into the other. A momentum schedule adds `count` to `batch_stats`, the updates that each
    feature has had, float32 and of the shape of `mean`.
    Initialization does not update statistics, needs no bound `axis_name`, and takes the batch as one ghost batch.

    Attributes:
        use_running_average: True normalizes by the running statistics; here or at the call.
        axis: the axis, or axes, that have statistics of their own.
        momentum: share of the old value kept at an update, or a schedule from a feature's count of updates to it.
        epsilon: added to the variance.
        dtype: dtype of the result; None is the one to which x, scale and bias promote, as in Flax.
        param_dtype: dtype of scale and bias.
        use_bias: whether there is a bias.
        use_scale: whether there is a scale.
        bias_init: initializer of the bias.
        scale_init: initializer of the scale.
        axis_name: mapped axis or axes to share statistics over.
        axis_index_groups: places on that axis that share among themselves only.
        use_fast_variance: changes nothing: the variance is exact at the speed of the fast one.
        force_float32_reductions: changes nothing: reductions and statistics are in float32 at least.
        running_var: which variance the running average takes: "biased", "unbiased" or "total".
        ghost_batch_size: normalize groups of this many examples on their own.
        activation: elementwise function, applied in float32 before the cast to `dtype`; it captures nothing traced.
        frozen: True normalizes by the running statistics and updates nothing, whatever `use_running_average` says.
        update_statistics: False leaves the running statistics as they are in training too; here or at the call.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jbn
        >>> norm = jbn.linen.BatchNorm(use_running_average=False, momentum=0.5)
        >>> x = jnp.array([[1.0, 10.0], [3.0, 30.0]])
        >>> variables = norm.init(jax.random.key(0), x)
        >>> out, updated = norm.apply(variables, x, mutable=["batch_stats"])
        >>> print(updated["batch_stats"]["mean"])
        [ 1. 10.]

    Source:
        Flax, flax.linen.BatchNorm, for the names; see `jbn.batch_norm` for what they do.
    """

    use_running_average: bool | None = None
    axis: int | Sequence[int] = -1
    momentum: float | Schedule = 0.99
    epsilon: float = 1e-5
    dtype: Any = None
    param_dtype: Any = jnp.float32
    use_bias: bool = True
    use_scale: bool = True
    bias_init: Callable[..., Any] = nn.initializers.zeros
    scale_init: Callable[..., Any] = nn.initializers.ones
    axis_name: AxisName | None = None
    axis_index_groups: IndexGroups | None = None
    use_fast_variance: bool = True
    force_float32_reductions: bool = True
    running_var: str = "biased"
    ghost_batch_size: int | None = None
    activation: Callable[[jax.Array], jax.Array] | None = None
    frozen: bool = False
    update_statistics: bool = True

    def __post_init__(self) -> None:
        """Check the dtypes."""
        _flax.check_dtypes(dtype=self.dtype, param_dtype=self.param_dtype)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
        shortcut: ArrayLike | None = None,
        update_statistics: bool | None = None,
    ) -> jax.Array:
        """Normalize x, and update `batch_stats` by its statistics unless they are used.

        Args:
            x: float32, float64, bfloat16 or float16 array; or complex64 or complex128, whose mean is complex64.
            use_running_average: True normalizes by the running statistics; here or at construction.
            mask: boolean, True counts; the shape of x without its feature axes, or of the rank of x; any axis may be
                1. What fits in neither way is placed from the last axis on, as in Flax. Masked values change nothing
                and come out as 0.
            shortcut: float array of the shape of x, added before the activation: the join of a residual block.
            update_statistics: False leaves `batch_stats` as they are; None is what the module says.

        Returns:
            The result, of the shape of x.

        Raises:
            NameError: no transformation binds `axis_name`.
            TypeError: a wrong kind or dtype of argument.
            ValueError: shapes or values that do not fit; or no `count` beside statistics that a schedule would update.
        """
        averaged = self.use_running_average
        if not self.frozen:
            averaged = nn.merge_param("use_running_average", averaged, use_running_average)
        mode, initializing = _flax.checked_mode(self, averaged, update_statistics), self.is_initializing()
        x, features = _flax.checked_call(self, x)

        counted = _flax.reads_count(self) if initializing else _flax.reads_count(self, mode)
        if counted and not initializing:
            self._check_count()
        mean_dtype = jnp.complex64 if is_complex(x) else jnp.float32
        mean = self.variable("batch_stats", "mean", jnp.zeros, features, mean_dtype)
        var = self.variable("batch_stats", "var", jnp.ones, features, jnp.float32)
        count = self.variable("batch_stats", "count", jnp.zeros, features, jnp.float32) if counted else None
        # Before Flax looks at the parameters' shapes, since it speaks of their initializers.
        _flax.check_shapes(self, x, features, mean=mean.value, var=var.value)
        scale = self.param("scale", self.scale_init, features, self.param_dtype) if self.use_scale else None
        bias = self.param("bias", self.bias_init, features, self.param_dtype) if self.use_bias else None
        promoted = [x, *(param for param in (scale, bias) if param is not None)]
        dtype = canonicalize_dtype(*promoted, dtype=self.dtype)
        state = State(mean.value, var.value, None if count is None else count.value)
        inputs = {"x": x, "mask": mask, "shortcut": shortcut}
        out, new_state = _flax.apply(self, Params(scale, bias), state, inputs, mode, dtype, initializing=initializing)
        if mode.updates and not initializing:
            mean.value, var.value = new_state.mean, new_state.var
            if count is not None:
                count.value = new_state.count
        return out

    def _check_count(self) -> None:
        """Statistics from elsewhere have no count, and from a count of 0 a schedule would overwrite them."""
        if self.has_variable("batch_stats", "mean") and not self.has_variable("batch_stats", "count"):
            raise ValueError(
                "`batch_stats` has `mean` and `var` but no `count`, which a schedule reads: from a count of 0, one of "
                "`momentum` would overwrite them. Say how many updates they stand for by "
                "jbn.convert.split(variables, 'linen', count=...) and jbn.convert.join(..., with_count=True); or give "
                "numbers for schedules."
            )


class BatchRenorm(BatchNorm):
    """Batch renormalization: `BatchNorm` whose training output is corrected towards the running statistics.

    out = activation((xhat * r + d) * scale + bias + shortcut), r and d clipped as in `jbn.batch_renorm`

    It has the attributes of `BatchNorm`, and stores its variables, with a `count` where a bound or the momentum is a
    schedule.

    Attributes:
        r_max: bound of r, at least 1, or a schedule from a feature's count of updates to it; 1 for the first 5,000
            updates, then up to 3 at 40,000.
        d_max: bound of d, at least 0, or a schedule; 0 for the first 5,000 updates, then up to 5 at 25,000.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> import jbn
        >>> norm = jbn.linen.BatchRenorm(use_running_average=False, r_max=jbn.renorm.r_max(begin=100, end=800))
        >>> variables = norm.init(jax.random.key(0), jnp.ones((4, 3)))
        >>> sorted(variables["batch_stats"])
        ['count', 'mean', 'var']

    Source:
        Ioffe, Batch Renormalization, 2017; see `jbn.batch_renorm`.
    """

    r_max: float | Schedule = PUBLISHED_R_MAX
    d_max: float | Schedule = PUBLISHED_D_MAX
