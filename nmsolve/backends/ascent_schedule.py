"""Constants of the dual ascent, shared by every backend.

The ascent (docs/internals/solver.md) alternates Newton steps on the row and the column duals of the problem
regularised by a box: an entry is *fractional* while it lies within ``1 / (2 tau)`` of its threshold. tau is
steered by what it does, not by the size of the scores: after each sweep it is set so that the mean number of
fractional entries per line falls geometrically from ``FRACTION_START * M`` to ``FRACTION_END``. That makes
the ascent independent of the scores' scale and of heavy tails.
"""

SWEEPS = 11
FRACTION_START = 0.24
FRACTION_END = 0.2

# Bounds on the change of tau in one sweep.
GROWTH_MIN = 0.25
GROWTH_MAX = 2.5

# A line has about 6 sum s (1 - s) fractional entries. A step divides by CURVATURE such sums, and so goes
# farther than Newton's. The last sweep counts the entries instead, and adds LAST_DAMPING where the others add
# DAMPING: the step is finite where nothing is fractional. A dual moves by at most STEP_LIMIT / tau.
CURVATURE = 5.0
DAMPING = 0.07
LAST_DAMPING = 0.6
STEP_LIMIT = 0.75

# The start: line means of the scores clipped to mean +- WINSOR * (mean absolute deviation), and tau there.
WINSOR = 4.0
TAU_START = 0.4
DEVIATION_FLOOR = 2.0**-24

# Duals to start from instead are clamped to +- WARM_LIMIT, for scores scaled to a largest of about 1.
WARM_LIMIT = 4.0
