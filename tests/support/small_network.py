"""`jbn train` with a network of one narrow block, which compiles fast: python -m support.small_network train

The files and messages of a run, and how it resumes, do not depend on the size of its network or on its picture.
"""

import sys

from jbn.cli.main import main
from jbn.demo import model, picture

STAGES = {"stage1": (4, 1)}


def blank_picture(folder, options, result):
    """An empty file instead of the picture of a run, which takes longer to draw than the run."""
    path = folder / "picture.png"
    path.touch()
    return path


if __name__ == "__main__":
    model.STAGES = STAGES
    picture.draw = blank_picture
    sys.exit(main())
