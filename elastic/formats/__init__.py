"""Files that other programs read: each target written and opened again, one file for each. Imports
`elastic.supernet` and what is below it."""

import os

# OpenVINO and NNCF tell their makers of every import and conversion over the network. They have no
# setting of a process for that, but tell nothing of continuous integration. CI=false lets them.
os.environ.setdefault("CI", "true")
os.environ.setdefault("NNCF_CI", "1")
