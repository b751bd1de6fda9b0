"""`python -m jbn` is `jbn`."""

import sys

from jbn.cli import main

sys.exit(main())
