"""Time and memory: measured here, or predicted from a table of this device; `elastic latency`.
Imports `elastic.evaluation` and what is below it; nothing of training, searching or exporting."""
