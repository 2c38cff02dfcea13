"""`elastic export`: a sub-adapter merged, written in every format, proved and reported. Imports
`elastic.latency` and what is below it; nothing of training or searching."""
