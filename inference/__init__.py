"""Use of a trained detector: `load` it, `predict`, and see where its queries look (`explain`), `export` it."""
