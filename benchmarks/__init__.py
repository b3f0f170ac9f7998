import engine  # noqa: F401 - before torch: it tells OpenMP how to wait
