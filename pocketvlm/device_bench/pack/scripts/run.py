"""Runs one job of the line protocol with the package beside this file."""

import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
LIBRARY = os.path.join(HERE, "lib")


def main():
    """Hands the command line to the runner; returns the exit status."""
    sys.path.insert(0, LIBRARY)
    # A program that runs in a process of its own finds the package there too.
    others = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    os.environ["PYTHONPATH"] = os.pathsep.join([LIBRARY] + others)
    if sys.version_info < (3, 11):
        return fail("Python %d.%d is too old; 3.11 or newer is needed" % sys.version_info[:2])
    try:
        from pocketvlm.device_bench.runner.worker import main as work
    except ImportError as error:
        return fail("%s: run `sh install` in the runner's folder" % error)
    return work(sys.argv[1:])


def fail(reason):
    """The last line of a job that could not be done, as the protocol has it."""
    sys.stdout.write(json.dumps({"schema": 3, "status": "failed", "reason": reason}) + "\n")
    return 2


if __name__ == "__main__":
    sys.exit(main())
