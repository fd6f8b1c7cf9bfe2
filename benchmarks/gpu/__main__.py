"""`python -m benchmarks.gpu`: benchmarks/gpu/command.py says what it does."""

from launch.interrupts import interrupts_end_at_once, take_interrupts

take_interrupts()
with interrupts_end_at_once():
    from benchmarks.gpu.command import main
    from launch import program

if __name__ == "__main__":
    program.run(main)
