"""Flax NNX modules for batch normalization, with Flax's attributes and variables and jbn's arithmetic."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import canonicalize_dtype, promote_dtype
from flax.typing import PromoteDtypeFn
from jax.core import Tracer
from jax.nn import initializers
from jax.typing import ArrayLike

from jbn import _arguments, _flax
from jbn._arguments import AxisName, IndexGroups
from jbn._complex import is_complex
from jbn._core.batch_renorm import PUBLISHED_D_MAX, PUBLISHED_R_MAX
from jbn._core.state import Params, State
from jbn.momentum import Schedule


class BatchNorm(nnx.Module):
    """Drop-in replacement for `flax.nnx.BatchNorm`, with the arithmetic and the options of `jbn.batch_norm`.

    out = activation((x - mean) / sqrt(var + epsilon) * scale + bias + shortcut)

    The variables are those of Flax: float32 `mean` and `var` as `nnx.BatchStat`, `scale` and `bias` as `nnx.Param`.
    Checkpoints of either module load into the other. A momentum schedule adds `count`, an `nnx.BatchStat`: the number
    of updates of each feature, in float32 and with the shape of `mean`. After loading statistics without a count, set
    it, as in `norm.count[...] = 10_000`. Otherwise training raises an error. Inside nnx.jit, where values cannot be
    checked, the schedule starts from 0 without a warning and overwrites the statistics.

    Args:
        num_features: number of features, or their shape if several axes have statistics of their own.
        use_running_average: True normalizes by the running statistics; the call overrides it, and `train()` and
            `eval()` change it.
        axis: axis or axes of the features; statistics are computed over all other axes.
        momentum: share of the old value kept at an update, or a schedule that computes it from a feature's count of
            updates.
        epsilon: added to the variance.
        dtype: dtype of the result; None means the dtype to which x, the statistics, scale and bias promote, as in
            Flax. A complex dtype makes the mean complex64, for complex x.
        param_dtype: dtype of scale and bias.
        use_bias: whether there is a bias.
        use_scale: whether there is a scale.
        bias_init: initializer of the bias.
        scale_init: initializer of the scale.
        axis_name: mapped axis or axes to share statistics over.
        axis_index_groups: groups of indices on that axis that share statistics, such as [[0, 1], [2, 3]].
        use_fast_variance: has no effect; the variance is always exact, at the speed of the fast one without a mask.
        promote_dtype: has no effect; the arithmetic always uses at least float32.
        running_var: which variance the running average uses: "biased", "unbiased" or "total".
        ghost_batch_size: number of examples in a ghost batch; each ghost batch is normalized on its own.
        activation: elementwise function, applied in float32 before the cast to `dtype`; it must not capture a traced
            value.
        frozen: True normalizes by the running statistics and updates nothing, whatever `train()` or
            `use_running_average` say; `model.set_attributes(jbn.nnx.BatchNorm, frozen=...)` changes it.
        update_statistics: False leaves the running statistics unchanged in training too; set it here or at the call.
        rngs: keys for the initializers.
        bias_metadata: metadata of the bias variable.
        scale_metadata: metadata of the scale variable.

    Raises:
        TypeError: a size is not an int, a dtype is not allowed, or `rngs` is not an nnx.Rngs.
        ValueError: a size is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jbn
        >>> norm = jbn.nnx.BatchNorm(2, momentum=0.5, rngs=nnx.Rngs(0))
        >>> out = norm(jnp.array([[1.0, 10.0], [3.0, 30.0]]))
        >>> print(norm.mean[...])
        [ 1. 10.]

    Source:
        Flax, flax.nnx.BatchNorm, for the names; `jbn.batch_norm` documents what they do.
    """

    # Defaults for modules that were pickled before these attributes existed.
    frozen = False
    update_statistics = True

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        use_running_average: bool | None = False,
        axis: int | Sequence[int] = -1,
        momentum: float | Schedule = 0.99,
        epsilon: float = 1e-5,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        use_bias: bool = True,
        use_scale: bool = True,
        bias_init: Callable[..., Any] = initializers.zeros,
        scale_init: Callable[..., Any] = initializers.ones,
        axis_name: AxisName | None = None,
        axis_index_groups: IndexGroups | None = None,
        use_fast_variance: bool = True,
        promote_dtype: PromoteDtypeFn = promote_dtype,
        running_var: str = "biased",
        ghost_batch_size: int | None = None,
        activation: Callable[[jax.Array], jax.Array] | None = None,
        frozen: bool = False,
        update_statistics: bool = True,
        rngs: nnx.Rngs,
        bias_metadata: Mapping[str, Any] = MappingProxyType({}),
        scale_metadata: Mapping[str, Any] = MappingProxyType({}),
    ) -> None:
        """Allocate the variables."""
        _flax.check_dtypes(dtype=dtype, param_dtype=param_dtype)
        features = _arguments.checked_features(num_features, "num_features")
        if (use_scale or use_bias) and not hasattr(rngs, "params"):
            raise TypeError(f"`rngs` is a {type(rngs).__name__} without a stream `params`: expected nnx.Rngs(0).")
        # The dtype of x is unknown here, so `dtype` and `param_dtype` decide.
        complex_input = any(dtype is not None and is_complex(jnp.dtype(dtype)) for dtype in (dtype, param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros(features, jnp.complex64 if complex_input else jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(features, jnp.float32))
        self.momentum = momentum
        self.count = nnx.data(nnx.BatchStat(jnp.zeros(features, jnp.float32)) if _flax.reads_count(self) else None)
        # Scale comes first, as in Flax, because each initializer draws the next key.
        scale = nnx.Param(scale_init(rngs.params(), features, param_dtype), **scale_metadata) if use_scale else None
        bias = nnx.Param(bias_init(rngs.params(), features, param_dtype), **bias_metadata) if use_bias else None
        self.scale, self.bias = nnx.data(scale), nnx.data(bias)

        self.num_features = num_features
        self.use_running_average = use_running_average
        self.axis = axis
        self.epsilon = epsilon
        self.dtype = dtype
        self.param_dtype = param_dtype
        self.use_bias = use_bias
        self.use_scale = use_scale
        self.axis_name = axis_name
        self.axis_index_groups = axis_index_groups
        self.running_var = running_var
        self.ghost_batch_size = ghost_batch_size
        self.activation = activation
        self.frozen = frozen
        self.update_statistics = update_statistics
        # Stored only because a model may read these options of Flax from its norms.
        self.use_fast_variance, self.promote_dtype = use_fast_variance, promote_dtype

    def __call__(
        self,
        x: ArrayLike,
        use_running_average: bool | None = None,
        *,
        mask: ArrayLike | None = None,
        shortcut: ArrayLike | None = None,
        update_statistics: bool | None = None,
    ) -> jax.Array:
        """Normalize x per feature, and update `mean` and `var` in training.

        Args:
            x: float32, float64, bfloat16 or float16 array; or complex64 or complex128, for a module with a complex
                `dtype`.
            use_running_average: True normalizes by the running statistics; None uses the attribute of the module.
            mask: boolean array, True for valid values. It has the shape of x without the feature axes, or the rank of
                x. Any axis may have size 1. A mask that fits neither is aligned with the last axes of x, as in Flax.
                Masked values, even NaN, have no effect, and their output is 0.
            shortcut: float array with the shape of x that a residual block adds before its activation.
            update_statistics: False leaves the running statistics unchanged; None uses the attribute of the module.

        Returns:
            The result, with the shape of x.

        Raises:
            NameError: no transformation binds `axis_name`.
            TypeError: an argument has the wrong type or dtype.
            ValueError: a shape or value does not fit, or a schedule would overwrite statistics that have no count.
                The latter cannot be checked inside nnx.jit, where values are traced.
        """
        averaged = self.use_running_average if use_running_average is None else use_running_average
        mode = _flax.checked_mode(self, averaged, update_statistics)
        x, features = _flax.checked_call(self, x)
        self._check_features(x, features)
        counted = _flax.reads_count(self, mode)
        if counted:
            self._check_count()
        params = Params(*(None if param is None else param[...] for param in (self.scale, self.bias)))
        count = self.count[...] if self.count is not None and (counted or mode.updates) else None
        state = State(self.mean[...], self.var[...], count)
        promoted = [array for array in (x, state.mean, state.var, *params) if array is not None]
        dtype = canonicalize_dtype(*promoted, dtype=self.dtype)
        inputs = {"x": x, "mask": mask, "shortcut": shortcut}
        out, new_state = _flax.apply(self, params, state, inputs, mode, dtype)
        if mode.updates:
            self.mean[...], self.var[...] = new_state.mean, new_state.var
            if self.count is not None:
                self.count[...] = new_state.count
        return out

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Set the mode for `nnx.view(model, use_running_average=...)`.

        Args:
          use_running_average: True normalizes by the running statistics; None leaves the attribute unchanged.

        Raises:
            Nothing.
        """
        # nnx.view_info parses this docstring and expects the argument to be indented by two spaces.
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _check_count(self) -> None:
        """Refuse loaded statistics without a count, since a schedule that starts from count 0 would overwrite them."""
        if self.count is None:
            raise ValueError(
                "`momentum` or a bound is a schedule, but the module was made with numbers and has no `count`. Give "
                "the schedule at construction."
            )
        mean, var, count = (variable[...] for variable in (self.mean, self.var, self.count))
        if any(isinstance(vector, Tracer) for vector in (mean, var, count)):
            return
        loaded = (np.asarray(mean) != 0) | (np.asarray(var) != 1)
        if np.any(loaded & (np.asarray(count) == 0) & ~np.isneginf(var)):
            raise ValueError(
                "`count` is 0, but `mean` and `var` are not the initial values: a schedule would overwrite them. Set "
                "the number of updates, as in norm.count[...] = 10_000, or use numbers instead of schedules."
            )

    def _check_features(self, x: jax.Array, given: tuple[int, ...]) -> None:
        """Check that x has the features that the module was made for."""
        expected = self.mean[...].shape
        if given != expected:
            raise ValueError(
                f"`x` of shape {x.shape} has features {given} on `axis` {self.axis}, but `num_features` is "
                f"{self.num_features}: expected features {expected}{_flax.of_fitting_axis(x, expected)}."
            )


class BatchRenorm(BatchNorm):
    """Batch renormalization: a `BatchNorm` that corrects its training output toward the running statistics.

    out = activation((xhat * r + d) * scale + bias + shortcut)

    The corrections r and d are clipped as in `jbn.batch_renorm`. The variables are those of `BatchNorm`, and `count`
    is stored if a bound or the momentum is a schedule.

    Args:
        num_features: number of features, or their shape if several axes have statistics of their own.
        r_max: bound of r, at least 1, or a schedule that computes it from a feature's count of updates. The default
            stays at 1 for the first 5,000 updates, then rises to 3 at 40,000.
        d_max: bound of d, at least 0, or a schedule. The default stays at 0 for the first 5,000 updates, then rises to
            5 at 25,000.
        rngs: keys for the initializers.
        **options: options of `BatchNorm`.

    Raises:
        TypeError: a size is not an int, a dtype is not allowed, or `rngs` is not an nnx.Rngs.
        ValueError: a size is negative.

    Example:
        >>> import jax.numpy as jnp
        >>> from flax import nnx
        >>> import jbn
        >>> norm = jbn.nnx.BatchRenorm(3, r_max=jbn.renorm.r_max(begin=100, end=800), rngs=nnx.Rngs(0))
        >>> print(norm(jnp.ones((4, 3))).shape, norm.count[...])
        (4, 3) [1. 1. 1.]

    Source:
        Ioffe, Batch Renormalization, 2017; see `jbn.batch_renorm`.
    """

    def __init__(
        self,
        num_features: int | Sequence[int],
        *,
        r_max: float | Schedule = PUBLISHED_R_MAX,
        d_max: float | Schedule = PUBLISHED_D_MAX,
        rngs: nnx.Rngs,
        **options: Any,
    ) -> None:
        """Allocate the variables."""
        self.r_max, self.d_max = r_max, d_max
        super().__init__(num_features, rngs=rngs, **options)
