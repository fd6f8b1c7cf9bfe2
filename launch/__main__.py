"""The program `tiglon`, which `python -m launch` is too."""

import signal

from launch.interrupts import interrupts_end_at_once, take_interrupts

if __name__ != "__mp_main__":  # a worker of a program of ours answers to it
    take_interrupts()
with interrupts_end_at_once():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})  # launch.interrupts.interrupts_held may have blocked it
    from launch.cli import main

if __name__ == "__main__":
    main()
