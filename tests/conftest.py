"""What all tests share: settings only."""

import os

from hypothesis import settings

# For the processes that tests start: torch's idle workers give the core back soon. Set before torch loads in them.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

settings.register_profile("kvik", derandomize=True, deadline=None)
settings.load_profile("kvik")
