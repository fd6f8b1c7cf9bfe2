"""The program `tiglon`, which `python -m launch` is too."""

import signal
import sys

try:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # launch.program.interrupts_held may have blocked it
    from launch.cli import main
except KeyboardInterrupt:  # before launch/program.py can report it
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    exec("")  # as in launch/program.py
    from launch.program import launcher_reports_interrupts

    if not launcher_reports_interrupts():
        print("tiglon: interrupted", file=sys.stderr)
    sys.exit(130)

if __name__ == "__main__":
    main()
