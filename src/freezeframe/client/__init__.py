"""Client of the REST socket; `ch-remote` and tests use it."""
