"""Run the command line as `python -m jbn`."""

import sys

from jbn.cli.main import main

sys.exit(main())
