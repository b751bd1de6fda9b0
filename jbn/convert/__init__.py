"""Bit-for-bit conversion of batch norms from and to other libraries, without importing those libraries.

`from_*` and `to_*` convert one norm; `split` and `join` convert every norm of a model. Only arrays are converted: pass
`epsilon` (1e-3 in Keras), `momentum`, `running_var` and `feature_axis` to `jbn.batch_norm` yourself.
"""

from jbn.convert._equinox import from_equinox
from jbn.convert._flax import from_linen, from_nnx, to_linen, to_nnx
from jbn.convert._haiku import from_haiku
from jbn.convert._keras import from_keras, to_keras
from jbn.convert._torch import from_torch, to_torch
from jbn.convert._trees import join, split

__all__ = [
    "from_equinox",
    "from_haiku",
    "from_keras",
    "from_linen",
    "from_nnx",
    "from_torch",
    "join",
    "split",
    "to_keras",
    "to_linen",
    "to_nnx",
    "to_torch",
]
