"""`python -m jbn` is `jbn`."""

import sys

from jbn.cli.main import main

sys.exit(main())
