"""Child processes to wait for, and the command that trains a small network in one."""

TIME_LIMIT = 300
"""Seconds after which a process that still waits for another is ended."""
SMALL = ("-m", "support.small_network", "train", "--batch-size", 16)


def finished(started):
    """Exit status and output of each process; all of them have ended."""
    try:
        outputs = [process.communicate(timeout=TIME_LIMIT)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, output) for process, output in zip(started, outputs, strict=True)]
