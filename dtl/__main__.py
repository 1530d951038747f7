"""`python -m dtl COMMAND`, which launchers can start too: `accelerate launch -m dtl train`."""

import sys

from dtl.cli import main

if __name__ == "__main__":
    sys.exit(main())
