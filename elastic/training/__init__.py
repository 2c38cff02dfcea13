"""`elastic train`: one task or a sequence, the stages, the loop, the dry run. Imports
`elastic.evaluation` and what is below it; nothing of latency, searching or exporting."""
