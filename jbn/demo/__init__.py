"""The training run of `jbn train`: a small residual network on handwritten digits, in plain JAX."""
