"""Base models: found, loaded, told apart by kind, packed in fewer bits, measured. Imports
`elastic.config` alone."""
