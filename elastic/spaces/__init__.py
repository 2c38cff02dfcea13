"""Search spaces: what may be elastic, how YAML declares it, and its points once bound to a model.
Imports `elastic.config` alone."""
