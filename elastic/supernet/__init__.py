"""The supernet: a base model with a super-adapter, one sub-adapter active; what comes first in it,
what it costs, where it is kept, and the compact model that is cut out of it. Imports
`elastic.data`, `elastic.adapters`, `elastic.run` and what is below them."""
