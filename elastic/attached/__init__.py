"""The Python API: what the commands do to a model in memory, without a run directory. Imports
`elastic.training`, `elastic.searching` and what is below them."""
