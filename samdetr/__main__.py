"""`python -m samdetr` is the command `samdetr`."""

import sys

from samdetr.console import main

sys.exit(main())
