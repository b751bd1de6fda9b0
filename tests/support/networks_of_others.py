"""Small networks of other projects with data to train on, one function for each package, for a study of their norms.

Each function takes a dtype, which it passes on where the network has such an option. The packages are imported inside.
"""

# pyright: reportMissingImports=false
# Each package has a virtual environment of its own.

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx


class Case(NamedTuple):
    """A network and its data: `step(params, stats, batch)` returns ((loss, new stats), gradients)."""

    step: Callable[..., Any]
    score: Callable[..., jax.Array]
    variables: Mapping[str, Any]
    data: tuple[np.ndarray, ...]
    tested: tuple[np.ndarray, ...]


def differentiated(loss):
    return jax.jit(jax.value_and_grad(loss, has_aux=True))


def cross_entropy(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def digits(channels):
    """Handwritten digits of scikit-learn, as images of 16 by 16: those to train on and those to test."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = np.kron(images.reshape(-1, 8, 8, 1) / 16, np.ones((2, 2, channels)))
    return halves(1500, images.astype(np.float32), labels.astype(np.int32))


def halves(size, *data):
    return tuple(part[:size] for part in data), tuple(part[size:] for part in data)


def linen_classifier(network, split, flag=None):
    """A classifier in Linen, which takes the flag for training; the score is the accuracy."""

    def apply(variables, x, train, **options):
        return network.apply(variables, x, **({flag: train} if flag else {}), **options)

    def loss(params, stats, batch):
        variables = {"params": params, "batch_stats": stats}
        logits, updated = apply(variables, batch[0], True, mutable=["batch_stats"])
        return cross_entropy(logits, batch[1]), updated["batch_stats"]

    def score(params, stats, batch):
        logits = apply({"params": params, "batch_stats": stats}, batch[0], False)
        return (logits.argmax(-1) == batch[1]).mean()

    init = functools.partial(network.init, **({flag: False} if flag else {}))
    return Case(differentiated(loss), jax.jit(score), jax.jit(init)(jax.random.key(0), split[0][0][:2]), *split)


def nnx_classifier(model, logits, split):
    """A classifier in NNX, where `logits(model, x)` takes the mode from the model; the score is the accuracy."""
    graph, *states, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)

    def filled(*values):
        pairs = zip(states, values, strict=True)
        return nnx.merge(
            graph, *(jax.tree.unflatten(jax.tree.structure(a), jax.tree.leaves(b)) for a, b in pairs), rest
        )

    def loss(params, stats, batch):
        model = filled(params, stats)
        model.train()
        return cross_entropy(logits(model, batch[0]), batch[1]), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    def score(params, stats, batch):
        model = filled(params, stats)
        model.eval()
        return (logits(model, batch[0]).argmax(-1) == batch[1]).mean()

    params, stats = map(nnx.to_pure_dict, states)
    return Case(differentiated(loss), jax.jit(score), {"params": params, "batch_stats": stats}, *split)


def jax_resnet(dtype):
    """A ResNet of two blocks. Its modules read the name when they are imported, so they are imported each time."""
    for module in [name for name in sys.modules if name.partition(".")[0] == "jax_resnet"]:
        del sys.modules[module]
    import jax_resnet as package

    network = package.ResNet(package.ResNetBlock, stage_sizes=[1, 1], n_classes=10, hidden_sizes=(16, 32))
    return linen_classifier(network, digits(3))


def audax(dtype):
    """A ResNet of two blocks; its own functions compute spectrograms of noisy tones, which have ten pitches."""
    from audax.core import functional
    from audax.models import resnet

    random, labels = np.random.default_rng(0), np.arange(1000) % 10
    phases = np.multiply.outer(200 * 2 ** (labels / 10), np.arange(2048) / 8000) + random.random((1000, 1))
    waves = sum(np.sin(2 * np.pi * harmonic * phases) for harmonic in (1, 2, 3)) + random.normal(size=(1000, 2048))
    with jax.enable_x64(False):
        power = functional.spectrogram(jnp.asarray(waves, jnp.float32), 0, jnp.hanning(256), 256, 128, 256)
        bank = functional.melscale_fbanks(power.shape[-1], 32, 8000, 0.0)
        images = np.asarray(jnp.log(functional.apply_melscale(power, bank) + 1e-3))[..., None]
    network = resnet.ResNet([1, 1], resnet.ResNetBlock, 10, num_filters=16, dtype=dtype)
    return linen_classifier(network, halves(800, images, labels.astype(np.int32)), "train")


def flaxmodels(dtype):
    """Its ResNet-18 without pretrained weights. Its norm computes in float32, whatever the dtype."""
    import flaxmodels as package

    network = package.ResNet18(output="logits", pretrained=None, num_classes=10, dtype=jnp.dtype(dtype).name)
    return linen_classifier(network, digits(3), "train")


def image_classification_jax(dtype):
    """A ResNet of two blocks under `jax.pmap` on two devices, whose norms share statistics by `axis_name`."""
    from image_classification_jax.models import resnet

    network = resnet.ResNet([1, 1], resnet.ResNetBlock, 10, num_filters=16, dtype=dtype)
    case = linen_classifier(network, digits(3), "is_training")

    @functools.partial(jax.pmap, axis_name="batch", in_axes=(None, None, 0))
    def shared_step(params, stats, batch):
        (loss, stats), gradients = case.step(params, stats, batch)
        return (jax.lax.pmean(loss, "batch"), stats), jax.lax.pmean(gradients, "batch")

    def step(params, stats, batch):
        parts = tuple(part.reshape(2, -1, *part.shape[1:]) for part in batch)
        return jax.tree.map(lambda leaf: leaf[0], shared_step(params, stats, parts))

    return case._replace(step=step)


def scvi(dtype):
    """Its variational autoencoder for counts of genes, on its own synthetic data; the score is the loss."""
    from scvi.data import synthetic_iid
    from scvi.module import JaxVAE

    np.random.seed(0)
    cells = synthetic_iid()
    order = np.random.default_rng(0).permutation(len(cells))
    genes, origin = cells.X[order].astype(np.float32), cells.obs["batch"].cat.codes.to_numpy()[order, None]
    module = JaxVAE(n_input=genes.shape[1], n_batch=2, n_hidden=32, n_latent=5)
    keys = {name: jax.random.key(0) for name in ("params", "z", "dropout")}

    def loss(params, stats, batch, train=True):
        given = {"params": params, "batch_stats": stats}, {"X": batch[0], "batch": batch[1]}
        out, updated = module.clone(training=train).apply(*given, rngs=keys, mutable=["batch_stats"])
        return out[2].loss, updated["batch_stats"]

    score = jax.jit(lambda *given: loss(*given, train=False)[0])
    variables = module.init(keys, {"X": genes[:4], "batch": origin[:4]})
    return Case(differentiated(loss), score, variables, *halves(320, genes, origin.astype(np.int32)))


def jraphx(dtype):
    """A GCN of three layers: the digits of a batch are nodes, with edges from their four nearest neighbors."""
    from jraphx.nn.models import GCN

    def logits(model, images):
        x = images[:, ::2, ::2].reshape(-1, 64)
        nearest = jnp.argsort(jnp.square(x[:, None] - x).sum(-1), 1)[:, 1:5]
        return model(x, jnp.stack([nearest.ravel(), jnp.repeat(jnp.arange(len(x)), 4)]))

    return nnx_classifier(GCN(64, 32, 3, 10, norm="batch_norm", rngs=nnx.Rngs(0)), logits, digits(1))


def artifex(dtype):
    """The discriminator of its DCGAN with ten outputs, which are probabilities."""
    from artifex.generative_models.core.configuration.network_configs import ConvDiscriminatorConfig
    from artifex.generative_models.models.gan.dcgan import DCGANDiscriminator

    options = {"name": "digits", "activation": "leaky_relu", "batch_norm": True, "output_dim": 10}
    config = ConvDiscriminatorConfig(input_shape=(1, 16, 16), hidden_dims=(16, 32, 64), **options)

    def logits(model, images):
        return jax.scipy.special.logit(model(jnp.moveaxis(images, 3, 1)))

    return nnx_classifier(DCGANDiscriminator(config, rngs=nnx.Rngs(0)), logits, digits(1))


def sbx(dtype, warmup_steps, activation=jax.nn.relu):
    """The critics of CrossQ on random steps of the pendulum; the score is their loss on other steps."""
    import gymnasium
    from sbx.crossq.policies import VectorCritic

    pendulum, steps = gymnasium.make("Pendulum-v1", max_episode_steps=1000), []
    pendulum.action_space.seed(0)
    before, _ = pendulum.reset(seed=0)
    for _ in range(1000):
        action = pendulum.action_space.sample()
        after, reward, *_ = pendulum.step(action)
        steps.append((before, action, after, np.float32(reward)))
        before = after
    data = [np.array(part) for part in zip(*steps, strict=True)]
    critic = VectorCritic([64, 64], renorm_warmup_steps=warmup_steps, activation_fn=activation)

    def loss(params, stats, batch, train=True):
        """As in CrossQ, one pass for the values before and after a step; the action after it is the same again."""
        before, action, after, reward = batch
        given = {"params": params, "batch_stats": stats}, jnp.concatenate([before, after]), jnp.tile(action, (2, 1))
        values, updated = critic.apply(*given, train=train, mutable=["batch_stats"])
        value, value_after = jnp.split(values[..., 0], 2, axis=1)
        target = jax.lax.stop_gradient(reward + 0.9 * value_after.min(0))
        return 0.5 * jnp.square(target - value).mean(1).sum(), updated["batch_stats"]

    score = jax.jit(lambda *given: loss(*given, train=False)[0])
    variables = critic.init(jax.random.key(0), data[0][:2], data[1][:2])
    return Case(differentiated(loss), score, variables, *halves(800, *data))
