"""One module for each kind of measurement; each has a ``run(peer, budget, ...)`` that yields a Measurement."""
