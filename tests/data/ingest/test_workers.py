import os
import signal
import time

from data.ingest.workers import executor_of


def blocked_signals() -> dict[int, set[int]]:
    time.sleep(0.05)  # long enough for the other worker to take the next call
    return {os.getpid(): {int(number) for number in signal.pthread_sigmask(signal.SIG_BLOCK, ())}}


def test_every_worker_leaves_an_interrupt_to_the_process_that_started_it():
    before = blocked_signals()
    with executor_of(2) as executor:
        blocked: dict[int, set[int]] = {}
        while len(blocked) < 2:
            for future in [executor.submit(blocked_signals) for _ in range(4)]:
                blocked |= future.result()
        assert all(signal.SIGINT in numbers for numbers in blocked.values()) and os.getpid() not in blocked
        assert blocked_signals() == before and signal.SIGINT not in before[os.getpid()]
