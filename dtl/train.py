"""Train: `accelerate launch dtl/train.py [--config FILE] [--section.key VALUE ...]`, the same as `dtl train`.

Exit status: 0 done; 2 the user's input is wrong; 75 stopped by a signal after saving, run the same command again; 1 a fault.
"""

from __future__ import annotations

import os
import sys

if not __package__:
    # Run as a file, this folder would come first on sys.path, and `import dtl` would not be found from a checkout.
    sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))

from dtl.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("train", sys.argv[1:]))
