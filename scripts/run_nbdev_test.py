"""`nbdev_test`, with a limit of time: a notebook that hangs is named, says where it stands, and fails, instead of holding everything up.

Arguments are those of `nbdev_test`.
"""
import faulthandler
import functools
import sys
from threading import Timer

import nbdev.test

LIMIT = 600.  # seconds for a notebook


def give_up(name) -> None:
    "Say that a notebook hangs, and where its threads stand, and end this process"
    print(f'{name} has not ended within {LIMIT:.0f} seconds. Its threads:', file=sys.__stderr__, flush=True)
    faulthandler.dump_traceback_later(.01, exit=True, file=sys.__stderr__)


def limited(test):
    "The same test, which ends its process when it takes too long"
    @functools.wraps(test)  # a worker process looks for it under its name
    def within_limit(name, *arguments, **named):
        timer = Timer(LIMIT, give_up, [name])
        timer.daemon = True
        timer.start()
        try: return test(name, *arguments, **named)
        finally: timer.cancel()
    return within_limit


if __name__ == '__main__':
    nbdev.test.test_nb = limited(nbdev.test.test_nb)
    nbdev.test.nbdev_test()
