"""Jobs across process boundaries: workers that die, parents that die, interrupts, and going on afterwards."""
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings, strategies as st

from datatools.core import UsageError
from datatools.jobs import Engine, Outcome, run_tasks
from datatools.ledger import Ledger
from datatools.testing import perform, sleep_for, square


def values(results): return [r.value for r in results]
def kinds(results): return [r.error.kind if r.error else 'value' for r in results]


def children(of: int = None) -> list:
    "The living descendants of a process, without the helper that Python keeps for shared memory."
    found = psutil.Process(of).children(recursive=True)
    return [p for p in found if p.status() != psutil.STATUS_ZOMBIE and 'resource_tracker' not in ' '.join(p.cmdline())]


def wait_until(condition, seconds: float = 60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(0.02)


class ShuffledEngine(Engine):
    "Ends calls in random order and lets some of their attempts fail: a world of accidents without processes."
    def __init__(self, seed: int, accidents: float):
        super().__init__(3)
        self.rng, self.accidents, self.calls, self.most = random.Random(seed), accidents, [], 0

    def submit(self, token, function, arguments):
        self.calls.append((token, function(*arguments)))
        self.most = max(self.most, len(self.calls))

    def collect(self, seconds):
        ended = []
        while self.calls and (self.rng.random() < 0.5 or seconds is None and not ended):
            token, value = self.calls.pop(self.rng.randrange(len(self.calls)))
            kind = self.rng.choice(['crash', 'timeout']) if self.rng.random() < self.accidents else 'value'
            ended.append((token, Outcome(kind, value if kind == 'value' else None)))
        return ended


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), count=st.integers(0, 40), window=st.integers(1, 12), accidents=st.floats(0, 1),
       retries=st.integers(0, 3))
def test_order_window_and_retries(seed, count, window, accidents, retries):
    engine, taken = ShuffledEngine(seed, accidents), []

    def tasks():
        for i in range(count):
            taken.append(i)
            yield str(i), (i,)
    for done, result in enumerate(run_tasks(square, tasks(), engine=engine, retries=retries, in_flight=window)):
        assert result.key == str(done)
        assert len(taken) <= done + window
        assert 1 <= result.attempts <= retries + 1
        assert result.value == done**2 if result.error is None else result.attempts == retries + 1
    assert len(taken) == count and engine.most <= window


def test_worker_count_changes_nothing():
    rng = random.Random(1)
    tasks = [(f'{i}', ('sleep_for', rng.choice([0, 0.02]))) if i % 5 else (f'{i}', ('fail', f'{i}')) for i in range(30)]
    runs = [[(r.key, r.value, str(r.error)) for r in run_tasks(perform, tasks, workers=n)] for n in (0, 1, 3)]
    assert runs[0] == runs[1] == runs[2]


def test_killed_worker_costs_its_own_task_one_retry():
    tasks, killed = [(f'{i}', ('process_number', 0.5)) for i in range(9)], []

    def killer():
        wait_until(lambda: len(children()) == 3)
        time.sleep(1.2)
        victim = random.Random(2).choice(children())
        killed.append(victim.pid)
        victim.kill()
    threading.Thread(target=killer).start()
    results = list(run_tasks(perform, tasks, workers=3))
    assert kinds(results) == ['value'] * 9
    assert sum(r.attempts for r in results) <= 10  # 9 if the worker was just between two tasks
    assert killed and children() == []


@pytest.mark.parametrize('accident, kind', [(('crash',), 'crash'), (('leave', 0), 'crash'), (('leave', 7), 'crash'),
                                            (('sleep_for', 60), 'timeout')])
def test_accidents_in_flight_do_not_touch_others(accident, kind):
    tasks = [(f'{i}', accident if i in (1, 4) else ('sleep_for', 0.1)) for i in range(8)]
    results = list(run_tasks(perform, tasks, workers=2, timeout=3, retries=0))
    assert kinds(results) == [kind if i in (1, 4) else 'value' for i in range(8)]
    assert [r.attempts for r in results] == [1] * 8


def test_idle_worker_may_die():
    results = run_tasks(square, ((f'{i}', (i,)) for i in range(6)), workers=1, in_flight=1)
    assert [next(results).value, next(results).value] == [0, 1]
    for child in children(): child.kill()
    time.sleep(0.3)
    assert values(results) == [4, 9, 16, 25]


def test_large_arguments_and_results():
    block = os.urandom(3_000_000)
    results = list(run_tasks(bytes.upper, [(f'{i}', (block,)) for i in range(4)], workers=2))
    assert values(results) == [block.upper()] * 4


def test_a_worker_that_dies_over_large_arguments():
    tasks = [(f'{i}', ('crash' if i == 1 else 'leave' if i == 2 else 'fail', os.urandom(500_000))) for i in range(4)]
    assert kinds(run_tasks(perform, tasks, workers=2, retries=0)) == ['exception', 'crash', 'exception', 'exception']


def test_what_cannot_be_pickled_is_an_error_of_its_task():
    tasks = [('arguments', (lambda: 0,)), ('fine', (2,))]
    assert kinds(run_tasks(square, tasks, workers=1)) == ['exception', 'value']
    results = list(run_tasks(open, [('result', (__file__,)), ('missing', ('/no/such/file',))], workers=1))
    assert 'cannot be pickled' in str(results[0].error) and 'FileNotFoundError' in str(results[1].error)
    with pytest.raises(UsageError, match='importable'): run_tasks(lambda: 0, [])


def test_a_function_typed_into_a_session_is_refused(python):
    program = 'from datatools.jobs import run_tasks\ndef double(x): return 2 * x\nrun_tasks(double, [])'
    assert 'it is defined in an interactive session' in python('-c', program).stderr


def test_leaving_early_ends_the_workers():
    results = run_tasks(sleep_for, ((f'{i}', (0.01 if i == 0 else 60,)) for i in range(10**9)), workers=2)
    next(results)
    assert len(children()) == 2
    start = time.monotonic()
    results.close()
    assert children() == [] and time.monotonic() - start < 30


def test_an_error_in_the_series_ends_the_workers():
    def broken():
        yield 'a', (1,)
        raise OSError('the list of files is gone')
    with pytest.raises(OSError, match='gone'): list(run_tasks(square, broken(), workers=2))
    assert children() == []


JOB = '''
import sys, time
from datatools.jobs import run_tasks
from datatools.testing import perform

if __name__ == '__main__':
    ledger, count, seconds, workers = sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    tasks = [(f'task {i}', ('sleep_for', seconds + i / 1e6)) for i in range(count)]
    for result in run_tasks(perform, tasks, workers=workers, ledger=ledger, ledger_config=dict(count=count)):
        print(result.key, result.value, flush=True)
'''


@pytest.fixture
def job(tmp_path):
    "Start the job above: `job(count, seconds, workers)` is a running process in a session of its own."
    script, started = tmp_path/'job.py', []
    script.write_text(JOB)

    def start(count, seconds, workers=2):
        command = [sys.executable, script, tmp_path/'ledger.jsonl', str(count), str(seconds), str(workers)]
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                                   start_new_session=True)
        started.append(process)
        return process
    yield start
    for process in started:
        if process.poll() is None: process.kill()
        process.communicate()


def finished(path: Path) -> list:
    "Keys of the whole lines of a ledger."
    lines = path.read_bytes().split(b'\n')[1:-1] if path.exists() else []
    return [json.loads(line)['key'] for line in lines]


def test_children_die_with_the_parent(job):
    process = job(4, 60)
    wait_until(lambda: len(children(process.pid)) == 2)
    time.sleep(0.7)  # busy
    family = psutil.Process(process.pid).children(recursive=True)
    assert len(family) >= 2
    process.kill()
    process.wait()
    assert psutil.wait_procs(family, timeout=30)[1] == []


def test_children_die_with_a_parent_killed_while_they_start(job):
    for delay in (0, 0.05, 0.15):
        process = job(4, 60)
        wait_until(lambda: children(process.pid))
        time.sleep(delay)
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        assert psutil.wait_procs(family, timeout=30)[1] == []


def test_resume_after_kill_at_several_moments(job, tmp_path):
    path, before = tmp_path/'ledger.jsonl', []
    for moment in (0, 3, 11, 12, 25):  # finished tasks
        process = job(30, 0.02)
        wait_until(lambda: path.exists() and len(finished(path)) >= moment)
        process.kill()
        process.wait()
        assert finished(path)[:len(before)] == before
        before = finished(path)
    with open(path, 'ab') as file: file.write(b'{"attempts":1,"key":"task 29","se')
    output, errors = job(30, 0.02).communicate(timeout=60)
    assert [line.rsplit(' ', 1)[0] for line in output.splitlines()] == [f'task {i}' for i in range(30)], errors
    keys = finished(path)
    assert keys[:len(before)] == before and sorted(keys) == sorted(set(keys)) and len(keys) == 30
    assert job(30, 0.02, 1).communicate(timeout=60)[0] == output  # only reads


@pytest.mark.parametrize('moment', ['start', 'work'])
def test_interrupt(job, tmp_path, moment):
    process = job(1000, 0.05)
    if moment == 'start': wait_until(lambda: children(process.pid))
    else: assert process.stdout.readline() and process.stdout.readline()
    family = children(process.pid)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the parent and all its children
    output, errors = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT)
    assert errors.count('Traceback') == 1 and errors.rstrip().endswith('KeyboardInterrupt'), errors
    assert psutil.wait_procs(family, timeout=30)[1] == []
    with Ledger(tmp_path/'ledger.jsonl', dict(count=1000)) as ledger:
        assert sorted(ledger.places) == sorted(finished(tmp_path/'ledger.jsonl'))


def test_missing_main_guard_is_explained(tmp_path, python):
    script = tmp_path/'job.py'
    script.write_text(JOB.replace("if __name__ == '__main__':", 'if True:'))
    done = python(script, tmp_path/'ledger.jsonl', 100, 0, 2, timeout=60)
    assert done.returncode == 1 and "start the job under `if __name__ == '__main__':`" in done.stderr.splitlines()[-1]


def test_two_runs_of_one_job_keep_apart(job, tmp_path):
    first = job(1000, 0.05)
    first.stdout.readline()
    output, errors = job(1000, 0.05).communicate(timeout=60)
    assert 'LockedError' in errors and f'process {first.pid} on ' in errors


def test_failed_tasks_are_tried_again(tmp_path):
    ledger, marker = tmp_path/'ledger.jsonl', tmp_path/'marker'
    tasks = [('a', ('square', 3)), ('b', ('crash_once', str(marker)))]
    assert kinds(run_tasks(perform, tasks, ledger=ledger, retries=0)) == ['value', 'crash']
    assert values(run_tasks(perform, tasks, ledger=ledger, retries=0)) == [9, 'second attempt']
    marker.unlink()
    assert values(run_tasks(perform, tasks, ledger=ledger, retries=0)) == [9, 'second attempt']  # not run at all
    assert not marker.exists()


@pytest.mark.drill
def test_many_kills():
    "Workers are killed all the time, at random moments; every task comes back, in order, with its value."
    stop, rng = threading.Event(), random.Random(3)

    def killer():
        while not stop.wait(rng.uniform(0, 0.6)):
            if family := children(): rng.choice(family).kill()
    thread = threading.Thread(target=killer)
    thread.start()
    try: results = list(run_tasks(perform, [(f'{i}', ('sleep_for', i % 7 / 100)) for i in range(300)], workers=3, retries=50))
    finally:
        stop.set()
        thread.join()
    assert values(results) == [i % 7 / 100 for i in range(300)]
