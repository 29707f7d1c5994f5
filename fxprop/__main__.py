"""`python -m fxprop`: the command line."""

import sys

from fxprop.cli import main

sys.exit(main())
