"""`elastic train` from a checkout: parse, call, print.

python train.py --help
"""

import sys

from elastic.__main__ import run

if __name__ == "__main__":
    sys.exit(run("train"))
