"""The command line: `jbn train`, `jbn bench`, `jbn momentum`, `jbn inspect`."""

import argparse
import os
import sys
from collections.abc import Sequence

import jbn
from jbn.cli import bench, inspect, momentum, train
from jbn.demo.options import OptionError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `jbn`. Return exit status 0 for success, 1 when the command finds a fault, 2 for a bad option."""
    parser = argparse.ArgumentParser(prog="jbn", description="Batch normalization for JAX.")
    parser.add_argument("--version", action="version", version=f"jbn {jbn.__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for command in (train, bench, momentum, inspect):
        command.add_parser(commands)
    given = vars(parser.parse_args(arguments))
    name, run = given.pop("command"), given.pop("run")
    try:
        status = run(given)
        sys.stdout.flush()
    except ModuleNotFoundError as error:
        if (error.name or "jbn").startswith("jbn"):
            raise
        parser.exit(1, f"jbn {name} needs {error.name}, which is not installed. Run: pip install 'jbn[demo]'\n")
    except KeyboardInterrupt:
        resume = "; --resume continues from the last checkpoint, if there is one" if name == "train" else ""
        parser.exit(130, f"\njbn {name}: interrupted{resume}\n")
    except BrokenPipeError:
        # Python flushes the rest of stdout when it exits, and would raise again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OptionError as error:
        parser.error(str(error))
    return status
