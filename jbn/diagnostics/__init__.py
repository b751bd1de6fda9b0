"""Diagnostics: formulas for the moving average, and checks of the statistics in a tree."""

from jbn.diagnostics._compare import compare
from jbn.diagnostics._health import health, is_faulty
from jbn.diagnostics._laws import (
    AverageWeights,
    average_weights,
    best_momentum,
    effective_batches,
    expected_error,
    half_life,
    initial_weight,
)
from jbn.diagnostics._table import Table
from jbn.diagnostics._variance import VarianceError, expected_variance

__all__ = [
    "AverageWeights",
    "Table",
    "VarianceError",
    "average_weights",
    "best_momentum",
    "compare",
    "effective_batches",
    "expected_error",
    "expected_variance",
    "half_life",
    "health",
    "initial_weight",
    "is_faulty",
]
