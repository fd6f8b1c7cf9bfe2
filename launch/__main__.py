"""The program `tiglon`, which `python -m launch` is too."""

import signal
import sys

try:
    from launch.cli import main
except KeyboardInterrupt:  # so early that nothing else is there to tell it
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    exec("")  # as in launch/program.py
    from launch.program import launcher_tells

    if not launcher_tells():
        print("tiglon: interrupted", file=sys.stderr)
    sys.exit(130)

if __name__ == "__main__":
    main()
