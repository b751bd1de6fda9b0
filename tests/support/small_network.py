"""`jbn` with a network of one narrow block in `jbn train`, which compiles soon: python -m support.small_network train

What a run writes, says and takes up again does not depend on the size of its network, nor on what its picture shows.
"""

import sys

from jbn.cli.main import main
from jbn.demo import model, picture

STAGES = {"stage1": (4, 1)}


def blank_picture(folder, options, result):
    """In place of the picture of a run, which takes longer to draw than the run."""
    path = folder / "picture.png"
    path.touch()
    return path


if __name__ == "__main__":
    model.STAGES = STAGES
    picture.draw = blank_picture
    sys.exit(main())
