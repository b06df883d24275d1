"""How normalisation treats tiny norms, the same in every engine."""

# Rows are divided by max(norm, EPS), as in F.normalize.
EPS = 1e-12

# The factor 1 / max(norm, EPS) of a row whose norm was clamped: at least this, since float32 rounds
# 1 / EPS. Such a row was divided by a constant, so its gradient has no projection.
CLAMPED = 0.9999e12
