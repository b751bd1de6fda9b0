"""Child processes that are waited for, and the command that trains a small network in one."""

TIME_LIMIT = 300
"""Seconds after which a process is ended that still waits for another."""
SMALL = ("-m", "support.small_network", "train", "--batch-size", 16)


def finished(started):
    """Exit status and output of each process; none is left behind."""
    try:
        outputs = [process.communicate(timeout=TIME_LIMIT)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]
