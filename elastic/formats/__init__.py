"""Files that other programs read: each target written and opened again, one file for each. Imports
`elastic.supernet` and what is below it."""
