"""What the tests share: the NumPy float64 oracle, tolerances, networks, and the drawing of cases."""
