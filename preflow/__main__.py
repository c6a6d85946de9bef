"""`python -m preflow` is `preflow`."""

import sys

from preflow.cli import main

sys.exit(main())
