"""What `jbn train` runs: a small residual network on handwritten digits, in plain JAX."""
