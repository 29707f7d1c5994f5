"""`python -m fxprop`: the command line."""

import sys

from fxprop.cli.main import main

sys.exit(main())
