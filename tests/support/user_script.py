"""A user's script that calls every public name; pyright checks it, and tests/docs/test_public.py runs it."""

import functools
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import optax
from flax import nnx, serialization

import jbn

matplotlib.use("agg")


def train_step(params: jbn.Params, state: jbn.State, x: jax.Array) -> tuple[jbn.Params, jbn.State]:
    def loss(params: jbn.Params) -> tuple[jax.Array, jbn.State]:
        out, new_state = jbn.batch_norm(
            params,
            state,
            x,
            True,
            momentum=jbn.momentum.warmup(0.99),
            epsilon=1e-3,
            feature_axis=(-1,),
            mask=jnp.ones(x.shape[:-1], bool),
            axis_name=None,
            ghost_batch_size=4,
            running_var="total",
            activation=jax.nn.relu,
            shortcut=x,
            dtype=jnp.float32,
        )
        return jnp.sum(out**2), new_state

    loss = jax.checkpoint(loss, policy=jbn.checkpoint_policy)
    gradients, new_state = jax.grad(loss, has_aux=True)(params)
    return jax.tree.map(lambda p, g: p - 0.1 * g, params, gradients), new_state


def convert_and_serve(params: jbn.Params, state: jbn.State) -> list[jbn.State]:
    states = [
        jbn.convert.from_torch(jbn.convert.to_torch(params, state))[1],
        jbn.convert.from_keras(jbn.convert.to_keras(params, state), count=3)[1],
        jbn.convert.from_linen(jbn.convert.to_linen(params, state, with_count=True))[1],
        jbn.convert.from_nnx(jbn.convert.to_nnx(params, state))[1],
    ]
    average = {"average": state.mean[None], "counter": 1}
    states.append(jbn.convert.from_haiku({"mean_ema": average, "var_ema": average})[1])
    others = [jbn.convert.from_equinox]
    norms, rest = jbn.convert.split(jbn.convert.join({"norm": (params, state)}, {}, "linen"), "linen")
    kernel, bias = jbn.fold(*norms["norm"], jnp.ones((2, 3)), epsilon=1e-3, output_axis=-1)
    path = Path(tempfile.mkdtemp()) / "saved"
    path.write_bytes(serialization.to_bytes(state))
    print(kernel.shape, bias.shape, rest, others, jbn.checkpoint.read(path)["count"])
    return [*states, jbn.checkpoint.restore(jbn.checkpoint.latest(path), state)]


def see_and_repair(params: jbn.Params, state: jbn.State, x: jax.Array) -> jbn.State:
    r_max, d_max = jbn.renorm.r_max(2.0, begin=10, end=20), jbn.renorm.d_max(begin=10, end=20)
    _, state = jbn.batch_renorm(params, state, x, True, r_max=r_max, d_max=d_max)
    population = jbn.calibrate(lambda s, x: jbn.batch_norm(params, s, x, True)[1], state, [x], weights=len)
    weights: jbn.diagnostics.AverageWeights = jbn.diagnostics.average_weights(0.9, 10)
    best = jbn.diagnostics.best_momentum(100, 32, distance=2.0)
    print(weights.start, jbn.diagnostics.initial_weight(best, 100), jbn.diagnostics.half_life(best))
    print(jbn.diagnostics.effective_batches(best), jbn.diagnostics.expected_error(best, 100, 32))
    spread: jbn.diagnostics.VarianceError = jbn.diagnostics.expected_variance(best, 100, 32, running_var="total")
    table: jbn.diagnostics.Table = jbn.diagnostics.compare(state, population)
    print(spread.bias, table, table.text(rows=1), jbn.diagnostics.health(state, population, far=0.1))
    print([jbn.diagnostics.is_faulty(row) for row in jbn.diagnostics.health(state).rows])
    axes = [
        jbn.plot.moving_average([1, 2], [0.0, 1.0], [0.0, 0.5], population=1.0),
        jbn.plot.initial_weight(100, {"0.9": 0.9}),
        jbn.plot.error_against_momentum(100, 32, distances=[1.0]),
        jbn.plot.running_against_population(state, population),
        jbn.plot.standard_deviations(state),
    ]
    print(axes, jbn.linen.BatchRenorm(), jbn.nnx.BatchRenorm(3, rngs=nnx.Rngs(0)))
    return population


def main() -> None:
    params, state = jbn.init(3)
    x = jax.random.normal(jax.random.key(0), (8, 3))
    params, state = jax.jit(train_step)(params, state, x)
    halves = [jbn.moments(half, feature_axis=-1, mask=None, axis_name=None) for half in jnp.split(x, 2)]
    whole: jbn.Moments = jbn.merge(*halves)
    state = jbn.merge_states(state, jbn.init(3)[1], weights=[3, 1])
    schedules: list[float | jbn.momentum.Schedule] = [
        0.9,
        jbn.momentum.cumulative(),
        jbn.momentum.debiased(0.9),
        jbn.momentum.per_microbatch(0.9, 4),
        jbn.momentum.from_torch(0.1),
        optax.linear_schedule(0.5, 0.99, 100),
    ]
    for schedule in schedules:
        state = jbn.update(jbn.unset(state), whole, momentum=schedule, running_var="unbiased")
        print(jbn.momentum.at(schedule, state.count[0], jnp.float32))
    state = jbn.upgrade(state._replace(count=jnp.int32(7)))
    infer = functools.partial(jbn.normalize, params, state, epsilon=1e-3, feature_axis=-1, mask=None, activation=None)
    linen = jbn.linen.BatchNorm(use_running_average=False, momentum=schedules[1], running_var="total")
    variables = linen.init(jax.random.key(0), x)
    _, updated = linen.apply(variables, x, mutable=["batch_stats"])
    print(updated["batch_stats"]["count"], jbn.nnx.BatchNorm(3, rngs=nnx.Rngs(0))(x, mask=x > 0, shortcut=x).shape)
    state = see_and_repair(params, state, x)
    print(convert_and_serve(params, state))
    print(infer(x, dtype=jnp.bfloat16).shape, float(state.mean[0]), jbn.Params(None, params.bias), jbn.__version__)


if __name__ == "__main__":
    main()
