"""Sub-adapters trained on at their own small size, with the maximal one as teacher, and judged
again: what a search found, or what is about to be exported."""
