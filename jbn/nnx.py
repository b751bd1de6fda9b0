"""Batch normalization as Flax NNX modules: Flax's attributes and variables, jbn's arithmetic."""

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
    """`flax.nnx.BatchNorm` by its own names, with the arithmetic and the options of `jbn.batch_norm`.

    out = activation((x - mean) / sqrt(var + epsilon) * scale + bias + shortcut)

    Variables are those of Flax, float32 `mean` and `var` as `nnx.BatchStat`, `scale` and `bias` as `nnx.Param`, so that
    checkpoints of either load into the other. A momentum schedule adds `count`, an `nnx.BatchStat` of the updates that
    each feature has had, float32 and of the shape of `mean`. After loading statistics without one, set it to the
    updates that they stand for, as in `norm.count[...] = 10_000`: training refuses them otherwise, but inside of
    nnx.jit, where values cannot be seen, the schedule starts from 0 and overwrites them.

    Args:
        num_features: the number of features, or their shape where several axes have statistics of their own.
        use_running_average: True normalizes by the running statistics; the call, `train()` and `eval()` override it.
        axis: the axis, or axes, that have statistics of their own.
        momentum: share of the old value kept at an update, or a schedule from a feature's count of updates to it.
        epsilon: added to the variance.
        dtype: dtype of the result; None is the one to which x, the statistics, scale and bias promote, as in Flax.
            A complex one makes the mean complex64, for complex x.
        param_dtype: dtype of scale and bias.
        use_bias: whether there is a bias.
        use_scale: whether there is a scale.
        bias_init: initializer of the bias.
        scale_init: initializer of the scale.
        axis_name: mapped axis or axes to share statistics over.
        axis_index_groups: places on that axis that share among themselves only.
        use_fast_variance: changes nothing: the variance is exact at the speed of the fast one.
        promote_dtype: changes nothing: the arithmetic is in float32 at least.
        running_var: which variance the running average takes: "biased", "unbiased" or "total".
        ghost_batch_size: normalize groups of this many examples on their own.
        activation: elementwise function, applied in float32 before the cast to `dtype`; it captures nothing traced.
        frozen: True normalizes by the running statistics and updates nothing, whatever `train()` or
            `use_running_average` say; `model.set_attributes(jbn.nnx.BatchNorm, frozen=...)` changes it.
        update_statistics: False leaves the running statistics as they are in training too; here or at the call.
        rngs: key of the initializers.
        bias_metadata: metadata of the bias variable.
        scale_metadata: metadata of the scale variable.

    Raises:
        TypeError: sizes that are no ints, dtypes that are not allowed, or rngs that are no nnx.Rngs.
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
        Flax, flax.nnx.BatchNorm, for the names; see `jbn.batch_norm` for what they do.
    """

    # Of modules that were pickled before there were these.
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
        # What x will be is not known here.
        complex_input = any(dtype is not None and is_complex(jnp.dtype(dtype)) for dtype in (dtype, param_dtype))
        self.mean = nnx.BatchStat(jnp.zeros(features, jnp.complex64 if complex_input else jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(features, jnp.float32))
        self.momentum = momentum
        self.count = nnx.data(nnx.BatchStat(jnp.zeros(features, jnp.float32)) if _flax.reads_count(self) else None)
        # Scale first, as in Flax: each initializer draws the next key.
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
        # Read by nothing here: a model may ask its norms for the options of Flax.
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
        """Normalize x, and update `mean` and `var` by its statistics unless they are used.

        Args:
            x: float32, float64, bfloat16 or float16 array; or complex64 or complex128, for a module with a complex
                `dtype`.
            use_running_average: True normalizes by the running statistics; None is what the module says.
            mask: boolean, True counts; the shape of x without its feature axes, or of the rank of x; any axis may be
                1. What fits in neither way is placed from the last axis on, as in Flax. Masked values change nothing
                and come out as 0.
            shortcut: float array of the shape of x, added before the activation: the join of a residual block.
            update_statistics: False leaves the running statistics as they are; None is what the module says.

        Returns:
            The result, of the shape of x.

        Raises:
            NameError: no transformation binds `axis_name`.
            TypeError: a wrong kind or dtype of argument.
            ValueError: shapes or values that do not fit; or statistics without a count, which a schedule would
                overwrite. Inside of nnx.jit, which hides values, the latter is not seen.
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
        """What `nnx.view(model, use_running_average=...)` sets.

        Args:
          use_running_average: True normalizes by the running statistics; None leaves it as it is.

        Raises:
            Nothing.
        """
        # nnx.view_info reads the argument from this docstring, where it is indented by two.
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def _check_count(self) -> None:
        """Statistics from elsewhere have no count, and from a count of 0 a schedule would overwrite them."""
        if self.count is None:
            raise ValueError(
                "`momentum` or a bound is a schedule, but the module was made for numbers and has no `count`: give the "
                "schedule at construction."
            )
        mean, var, count = (variable[...] for variable in (self.mean, self.var, self.count))
        if any(isinstance(vector, Tracer) for vector in (mean, var, count)):
            return
        loaded = (np.asarray(mean) != 0) | (np.asarray(var) != 1)
        if np.any(loaded & (np.asarray(count) == 0) & ~np.isneginf(var)):
            raise ValueError(
                "`count` is 0 beside a `mean` and `var` that are not those of a new module: a schedule would overwrite "
                "them. Say how many updates they stand for, as in norm.count[...] = 10_000; or give numbers for "
                "schedules."
            )

    def _check_features(self, x: jax.Array, given: tuple[int, ...]) -> None:
        """The features that x has are those that the module was made for."""
        expected = self.mean[...].shape
        if given != expected:
            raise ValueError(
                f"`x` of shape {x.shape} has features {given} on `axis` {self.axis}, but `num_features` is "
                f"{self.num_features}: give x {expected} there, or make the module with num_features={given}."
            )


class BatchRenorm(BatchNorm):
    """Batch renormalization: `BatchNorm` whose training output is corrected towards the running statistics.

    out = activation((xhat * r + d) * scale + bias + shortcut), r and d clipped as in `jbn.batch_renorm`

    It stores the variables of `BatchNorm`, with a `count` where a bound or the momentum is a schedule.

    Args:
        num_features: the number of features, or their shape where several axes have statistics of their own.
        r_max: bound of r, at least 1, or a schedule from a feature's count of updates to it; 1 for the first 5,000
            updates, then up to 3 at 40,000.
        d_max: bound of d, at least 0, or a schedule; 0 for the first 5,000 updates, then up to 5 at 25,000.
        rngs: key of the initializers.
        **options: those of `BatchNorm`.

    Raises:
        TypeError: sizes that are no ints, dtypes that are not allowed, or rngs that are no nnx.Rngs.
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
