"""How often a model is right, how sure that is, and `elastic evaluate`. Imports `elastic.formats`
and what is below it."""
