"""`jbn` with a network of one narrow block in `jbn train`, which compiles soon: python -m support.small_network train

What a run writes, says and takes up again does not depend on the size of its network.
"""

import sys

from jbn.cli.main import main
from jbn.demo import model

STAGES = {"stage1": (4, 1)}


if __name__ == "__main__":
    model.STAGES = STAGES
    sys.exit(main())
