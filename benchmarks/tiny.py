"""Whether the tests start a benchmark at a small size, to see that it runs."""

import os

TINY = "RETEMPER_BENCH_TINY" in os.environ
