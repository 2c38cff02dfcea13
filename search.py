"""`elastic search` from a checkout: parse, call, print.

python search.py --help
"""

import sys

from elastic.__main__ import run

if __name__ == "__main__":
    sys.exit(run("search"))
