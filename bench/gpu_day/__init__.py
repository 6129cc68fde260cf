"""A day with a GPU, in ten minutes: ``python bench gpu_day --out DIR``."""

import plain_checkout

plain_checkout.arrange()  # also in processes that are started for one job
