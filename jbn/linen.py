"""Flax Linen modules for batch normalization, with Flax's attributes and variables and jbn's arithmetic."""

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
    """Drop-in replacement for `flax.linen.BatchNorm`, with the arithmetic and the options of `jbn.batch_norm`.

    out = activation((x - mean) / sqrt(var + epsilon) * scale + bias + shortcut)

    The variables are those of Flax: float32 `mean` and `var` in `batch_stats`, `scale` and `bias` in `params`.
    Checkpoints of either module load into the other. A momentum schedule adds `count` to `batch_stats`: the number of
    updates of each feature, in float32 and with the shape of `mean`.
    Initialization does not update statistics, does not need `axis_name` to be bound, and ignores `ghost_batch_size`.

    Attributes:
        use_running_average: True normalizes by the running statistics; set it here or at the call.
        axis: axis or axes of the features; statistics are computed over all other axes.
        momentum: share of the old value kept at an update, or a schedule that computes it from a feature's count of
            updates.
        epsilon: added to the variance.
        dtype: dtype of the result; None means the dtype to which x, scale and bias promote, as in Flax.
        param_dtype: dtype of scale and bias.
        use_bias: whether there is a bias.
        use_scale: whether there is a scale.
        bias_init: initializer of the bias.
        scale_init: initializer of the scale.
        axis_name: mapped axis or axes to share statistics over.
        axis_index_groups: groups of indices on that axis that share statistics, such as [[0, 1], [2, 3]].
        use_fast_variance: has no effect; the variance is always exact, at the speed of the fast one without a mask.
        force_float32_reductions: has no effect; reductions and statistics always use at least float32.
        running_var: which variance the running average uses: "biased", "unbiased" or "total".
        ghost_batch_size: number of examples in a ghost batch; each ghost batch is normalized on its own.
        activation: elementwise function, applied in float32 before the cast to `dtype`; it must not capture a traced
            value.
        frozen: True normalizes by the running statistics and updates nothing, whatever `use_running_average` says.
        update_statistics: False leaves the running statistics unchanged in training too; set it here or at the call.

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
        Flax, flax.linen.BatchNorm, for the names; `jbn.batch_norm` documents what they do.
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
        """Normalize x per feature, and update `batch_stats` in training.

        Args:
            x: float32, float64, bfloat16, float16, complex64 or complex128 array; the mean of complex x is complex64.
            use_running_average: True normalizes by the running statistics; set it here or at construction.
            mask: boolean array, True for valid values. It has the shape of x without the feature axes, or the rank of
                x. Any axis may have size 1. A mask that fits neither is aligned with the last axes of x, as in Flax.
                Masked values, even NaN, have no effect, and their output is 0.
            shortcut: float array with the shape of x that a residual block adds before its activation.
            update_statistics: False leaves `batch_stats` unchanged; None uses the attribute of the module.

        Returns:
            The result, with the shape of x.

        Raises:
            NameError: no transformation binds `axis_name`.
            TypeError: an argument has the wrong type or dtype.
            ValueError: a shape or value does not fit, or a schedule would update statistics that have no `count`.
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
        # This check comes before `self.param`, because Flax's own error blames the initializers.
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
        """Refuse loaded statistics without a count, since a schedule that starts from count 0 would overwrite them."""
        if self.has_variable("batch_stats", "mean") and not self.has_variable("batch_stats", "count"):
            raise ValueError(
                "`batch_stats` has `mean` and `var` but no `count`, which a schedule reads. A momentum schedule that "
                "starts from count 0 would overwrite them. Set the number of updates with "
                "jbn.convert.split(variables, 'linen', count=...) and jbn.convert.join(..., with_count=True), or use "
                "numbers instead of schedules."
            )


class BatchRenorm(BatchNorm):
    """Batch renormalization: a `BatchNorm` that corrects its training output toward the running statistics.

    out = activation((xhat * r + d) * scale + bias + shortcut)

    The corrections r and d are clipped as in `jbn.batch_renorm`. Attributes and variables are those of `BatchNorm`,
    and `count` is stored if a bound or the momentum is a schedule.

    Attributes:
        r_max: bound of r, at least 1, or a schedule that computes it from a feature's count of updates. The default
            stays at 1 for the first 5,000 updates, then rises to 3 at 40,000.
        d_max: bound of d, at least 0, or a schedule. The default stays at 0 for the first 5,000 updates, then rises to
            5 at 25,000.

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
