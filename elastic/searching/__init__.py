"""`elastic search`: the Optuna study, its sampler, objectives, budget, and the front. Imports
`elastic.latency` and what is below it; nothing of training or exporting."""
