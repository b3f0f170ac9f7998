"""Token ids in, tokens out. Knows torch and Transformers; knows no HTTP, no SQL, no settings."""

import os

# Read by torch's OpenMP when that is loaded. Threads that share a product wait for each other in
# circles, usually for milliseconds: so they keep a processor from the very thread that they wait
# for, where another process has the other one (docs/decisions/0019-who-waits-comes-first.md).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
