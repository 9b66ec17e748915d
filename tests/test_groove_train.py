"""Training survives: killed at every durable step, interrupted, out of disk, and meddled with, it resumes to the same bytes or says what is wrong."""
import hashlib
import json
import logging
import os
import pickle
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import psutil
import pytest
from typer.testing import CliRunner

from datatools.core import FormatError
from datatools.groove.__main__ import app
from datatools.groove.counts import KeyLayout
from datatools.groove.stores import MemmapStore, read_order_shards
from datatools.testing import write_drum_corpus

ROOT = Path(__file__).resolve().parent.parent
STORES = ['memory', 'memmap', 'sqlite']
ODD = ['div0.mid', 'smpte_e728.mid', 'tempo0.mid', 'noEOT.mid', 'riff_rmi.mid', 'vel_gt127.mid']


def sha(path):
    "Of a file, or None"
    return hashlib.sha256(Path(path).read_bytes()).hexdigest() if Path(path).exists() else None


def command(*arguments, code=0, **options):
    "Run the command line in this process; what it printed, errors included"
    for handler in list(logging.getLogger().handlers): logging.getLogger().removeHandler(handler)  # each call has an error stream of its own
    done = CliRunner().invoke(app, list(map(str, arguments)), **options)
    if done.exception is not None and not isinstance(done.exception, SystemExit): raise done.exception
    assert done.exit_code == code, done.output
    if code: assert done.stderr.startswith('Error: ') or 'Usage: ' in done.stderr, done.stderr
    return done.output


def train(corpus, *arguments, code=0): return command('train', corpus, '--log-every', 0, *arguments, code=code)


@pytest.fixture(scope='session')
def corpus(tmp_path_factory, request):
    "Seven loops, two broken files, and some odd ones where the shared data is there"
    folder = tmp_path_factory.mktemp('corpus')
    loop = write_drum_corpus(folder, 7)[0].read_bytes()
    (folder/'a not midi.mid').write_bytes(b'nope' * 300)
    (folder/'loop-0002 truncated ÿ.mid').write_bytes(loop[:-30])
    odd = Path(os.environ.get('DATATOOLS_TEST_DATA') or ROOT.parent/'shared/data')/'midi_odd/synthetic'
    for name in ODD:
        if (odd/name).exists(): shutil.copy(odd/name, folder/f'odd {name}')
    return folder


@pytest.fixture
def quick(tmp_path):
    "A directory in memory where there is one: thousands of fsyncs cost nothing there"
    with tempfile.TemporaryDirectory(dir='/dev/shm' if os.access('/dev/shm', os.W_OK) else tmp_path) as folder: yield Path(folder)


# One process loads everything once and forks a child for every run, so that hundreds of kills fit into seconds.
# A step is anything that lasts: opening a file to write, renaming, deleting, fsync, an SQL statement; each is a place to die before and after.
DRIVER = '''
import hashlib, io, itertools, json, os, resource, shutil, signal, sqlite3, sys, time, traceback
from pathlib import Path
from datatools.groove.__main__ import app

job = json.loads(sys.argv[1])
scratch, output = Path(job['scratch']), Path(job['scratch'])/'run/model'


def watch(kill_at, log):
    "Number the steps of this process; die at one of them"
    count = itertools.count(1)

    def step(what):
        number = next(count)
        if log: os.write(log, (what + os.linesep).encode())
        if number == kill_at: os.kill(os.getpid(), signal.SIGKILL)

    def hook(event, arguments):
        if event == 'open' and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT): step(f'open {arguments[0]}')
        elif event in ('os.rename', 'os.remove', 'os.mkdir', 'os.truncate', 'fcntl.flock', 'sqlite3.connect'): step(f'{event} {arguments[:1]}')

    class Connection(sqlite3.Connection):
        def execute(self, statement, *rest):
            step(f'before {statement[:30]}')
            try: return super().execute(statement, *rest)
            finally: step(f'after {statement[:30]}')

        def executemany(self, statement, *rest):
            step(f'before many {statement[:30]}')
            try: return super().executemany(statement, *rest)
            finally: step(f'after many {statement[:30]}')
    fsync, connect = os.fsync, sqlite3.connect

    def watched_fsync(descriptor):
        step('before fsync')
        fsync(descriptor)
        step('after fsync')
    os.fsync, sqlite3.connect = watched_fsync, lambda *rest, **options: connect(*rest, factory=Connection, **options)
    sys.addaudithook(hook)


def run(arguments, kill_at=None, log=None, limit=None, deadly=False):
    "Train in a forked child: its exit code, or minus the signal that ended it"
    child = os.fork()
    if child == 0:
        errors = os.open(scratch/'errors', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2): os.dup2(errors, stream)
        log = log and os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        if kill_at or log: watch(kill_at, log)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if limit is not None:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        code = 99
        try:
            app(['train', job['corpus'], '-o', str(output), '--save-every', '2', '--log-every', '0', *arguments])
        except SystemExit as end: code = end.code or 0
        except BaseException: traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def errors(): return (scratch/'errors').read_text(errors='replace')
def result(): return [hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None for path in (output, Path(f'{output}.skipped.jsonl'))]
def clear(): shutil.rmtree(output.parent, ignore_errors=True)


failures, tried = [], 0
for arguments in job['runs'] * 2:  # twice: the first run of all loads and keeps compiled code
    clear()
    try: app(['train', job['corpus'], '-o', str(output), '--save-every', '2', '--log-every', '0', *arguments])
    except SystemExit as end: assert not end.code

for number, arguments in enumerate(job['runs']):
    clear()
    assert run(arguments, log=scratch/'steps') == 0, errors()
    expected, steps = result(), (scratch/'steps').read_text().splitlines()
    largest = max(path.stat().st_size for path in output.parent.rglob('*') if path.is_file())
    if job['mode'] == 'kill':
        points = range(1 + number % job['stride'], len(steps) + 1, job['stride'])
        places = [(dict(kill_at=at), [-signal.SIGKILL], f'step {at} of {len(steps)}: {steps[at - 1]}') for at in points]
    else:
        limits = [int(largest * 1.5 * i / job['limits']) for i in range(job['limits'])]
        places = [(dict(limit=limit, deadly=deadly), [0, -signal.SIGXFSZ if deadly else 1], f'file size limit {limit}, deadly {deadly}') for limit in limits for deadly in (False, True)]
    for place, allowed, name in places:
        clear()
        tried += 1
        code = run(arguments, **place)
        if code not in allowed or code == 1 and (errors().count(chr(10)) != 1 or not errors().startswith('Error: ')) and place['limit'] > 1000:
            failures.append([arguments, name, code, errors()[-600:]])
        if tried % 3 == 0 and 'kill_at' in place: run([*arguments, '--resume'], kill_at=place['kill_at'] % 50 + 3)  # and again
        code = run([*arguments, '--resume'])
        if code or result() != expected: failures.append([arguments, name, code, result() == expected, errors()[-600:]])
print(chr(10) + json.dumps(dict(tried=tried, failures=failures)))
'''

RUNS = [['--store', store, *shard] for store in STORES for shard in ([], ['--shard-index', '1', '--num-shards', '2'])]
STYLED = [['--store', store, '--aux-key', 'style', '--hash-buckets', '4', '--max-rows-per-shard', '50'] for store in STORES]


def drive(corpus, folder, timeout=120, **job):
    "Run the driver; the number of places tried"
    (folder/'drive.py').write_text(DRIVER)
    done = subprocess.run([sys.executable, folder/'drive.py', json.dumps(dict(job, corpus=str(corpus), scratch=str(folder)))], capture_output=True, text=True, cwd=ROOT, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found['failures'], '\n'.join(map(str, found['failures'][:5]))
    return found['tried']


def test_killed_at_any_step(corpus, quick):
    assert drive(corpus, quick, mode='kill', stride=19, runs=RUNS) > 50


@pytest.mark.drill
@pytest.mark.parametrize('stride, runs', [(1, RUNS), (3, STYLED)], ids=['shards', 'styles'])
def test_killed_at_every_step(corpus, quick, stride, runs):
    assert drive(corpus, quick, 1800, mode='kill', stride=stride, runs=runs) > 500


def test_disk_full_keeps_the_previous_checkpoint(corpus, quick):
    "No file may grow beyond a limit: an error, or death in the middle of a write; the run resumes from the checkpoint before"
    assert drive(corpus, quick, mode='full', limits=5, runs=RUNS[::2]) == 30


@pytest.mark.drill
def test_disk_full_at_many_sizes(corpus, quick): drive(corpus, quick, 1800, mode='full', limits=30, runs=RUNS + STYLED)


@pytest.mark.parametrize('kilobytes', [60, 120, 200])
@pytest.mark.parametrize('store', STORES)
def test_a_file_system_that_fills_up(corpus, tmp_path, store, kilobytes):
    train(corpus, '-o', tmp_path/'reference')
    disk = tmp_path/'disk'
    disk.mkdir()
    if os.geteuid() or subprocess.run(['mount', '-t', 'tmpfs', '-o', f'size={kilobytes}k', 'tmpfs', disk], capture_output=True).returncode:
        pytest.skip('mounting a small file system needs root')
    try:
        arguments = ['-o', disk/'model', '--store', store, '--save-every', 2]
        try: said = train(corpus, *arguments, code=1)
        except AssertionError: assert sha(disk/'model') == sha(tmp_path/'reference')  # it was large enough
        else: assert said.count('\n') == 1 and ('space' in said or 'full' in said or 'disk' in said)
        subprocess.run(['mount', '-o', 'remount,size=100m', disk], check=True)
        train(corpus, *arguments, '--resume')
        assert sha(disk/'model') == sha(tmp_path/'reference')
    finally: subprocess.run(['umount', disk], check=True)


# Whole processes: worker processes, Ctrl-C, two at once. Reading is slowed down so that there is time to interfere.
SLOW = '''
import sys, time
from datatools.groove import files
read = files.read_bytes

def slow(path, least):
    time.sleep(float(sys.argv[1]))
    return read(path, least)
files.read_bytes = slow

if __name__ == '__main__':
    from datatools.groove.__main__ import app
    app(sys.argv[2:])
'''


@pytest.fixture
def process(tmp_path):
    "Start training in a process group of its own: `process(seconds per file, arguments …)`"
    started = []
    (tmp_path/'slow.py').write_text(SLOW)

    def start(seconds, *arguments):
        call = [sys.executable, tmp_path/'slow.py', seconds, 'train', *arguments]
        started.append(subprocess.Popen(list(map(str, call)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, start_new_session=True))
        return started[-1]
    yield start
    for each in started:
        if each.poll() is None: each.kill()
        each.communicate()


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, 'it did not happen'
        time.sleep(0.01)


def kill_and_resume(process, corpus, folder, seed, store, jobs, kills=3):
    "Kill at random moments, resume each time; the last run ends by itself"
    rng, arguments = random.Random(seed), [corpus, '-o', folder/'model', '--store', store, '--n-jobs', jobs, '--save-every', 2, '--resume']
    for _ in range(kills):
        running = process(0.04, *arguments)
        time.sleep(rng.uniform(0.8, 3.5))
        family = psutil.Process(running.pid).children(recursive=True) if running.poll() is None else []
        running.kill()
        running.communicate()
        assert psutil.wait_procs(family, timeout=5)[1] == []
    output, errors = process(0, *arguments).communicate(timeout=60)
    assert 'skip report' in output, errors
    return sha(folder/'model'), sha(folder/'model.skipped.jsonl')


def reference(corpus, folder, *arguments):
    train(corpus, '-o', folder/'reference', *arguments)
    return sha(folder/'reference'), sha(folder/'reference.skipped.jsonl')


def test_killed_with_worker_processes(process, corpus, tmp_path):
    assert kill_and_resume(process, corpus, tmp_path, 1, 'memmap', 2, kills=1) == reference(corpus, tmp_path)


@pytest.mark.drill
@pytest.mark.parametrize('jobs', [1, 2])
@pytest.mark.parametrize('store', STORES)
def test_killed_at_random_moments(process, corpus, tmp_path, store, jobs):
    expected = reference(corpus, tmp_path)
    for seed in range(3):
        (tmp_path/f'{seed}').mkdir()
        assert kill_and_resume(process, corpus, tmp_path/f'{seed}', seed, store, jobs) == expected


def test_ctrl_c(process, corpus, tmp_path):
    reference(corpus, tmp_path)  # compiles, so that the processes do not have to
    for jobs in (1, 2):
        arguments, checkpoint = [corpus, '-o', tmp_path/f'{jobs}', '--n-jobs', jobs, '--save-every', 2], tmp_path/f'{jobs}.checkpoints/shard-0-of-1.checkpoint'
        each = process(0.15, *arguments)
        wait_until(lambda: checkpoint.exists() or each.poll() is not None)
        family = psutil.Process(each.pid).children(recursive=True)
        assert len(family) >= jobs if jobs > 1 else not family
        os.killpg(each.pid, signal.SIGINT)  # as a terminal does: to the parent and all its children
        output, errors = each.communicate(timeout=20)
        assert each.returncode in (130, -signal.SIGINT) and errors.count('Interrupted') == 1 and '--resume' in errors and 'Traceback' not in errors, errors
        assert psutil.wait_procs(family, timeout=5)[1] == [] and checkpoint.exists() and not (tmp_path/f'{jobs}').exists()
        train(corpus, '-o', tmp_path/f'{jobs}', '--n-jobs', jobs, '--save-every', 2, '--resume')
        assert (sha(tmp_path/f'{jobs}'), sha(tmp_path/f'{jobs}.skipped.jsonl')) == reference(corpus, tmp_path)


def test_only_one_at_a_time(process, corpus, tmp_path):
    "On one checkpoint, one database, one memmap directory: the second hears so at once, the first goes on"
    started = {}
    for store in STORES:
        place = dict(memory=['--checkpoint-dir', tmp_path/'place'], memmap=['--memmap-dir', tmp_path/'counts'], sqlite=['--db-path', tmp_path/'counts.db'])[store]
        started[store] = process(0.15, corpus, '-o', tmp_path/store, '--store', store, '--save-every', 2, *place), place
    for store, (first, place) in started.items():
        folder = Path(place[1]) if store == 'memory' else tmp_path/f'{store}.checkpoints'
        wait_until(lambda: (folder/'shard-0-of-1.checkpoint').exists() or first.poll() is not None)
        said = train(corpus, '-o', tmp_path/f'second {store}', '--store', store, '--resume', *place, code=1)
        assert f'is held by process {first.pid} on ' in said and not (tmp_path/f'second {store}').exists()
    for store, (first, _) in started.items():
        output, errors = first.communicate(timeout=60)
        assert first.returncode == 0, errors
        assert (sha(tmp_path/store), sha(tmp_path/f'{store}.skipped.jsonl')) == reference(corpus, tmp_path)


# Resuming what belongs to another run, or what is damaged. `--fail-fast` is a cheap way to stop with a checkpoint.

@pytest.fixture(params=STORES)
def stopped(request, corpus, tmp_path):
    "(store, arguments of a run that has stopped in the middle, its checkpoint)"
    (tmp_path/'list').write_bytes(b''.join(os.fsencode(path) + b'\n' for path in sorted(corpus.glob('loop*.mid'))))  # the third is truncated
    (tmp_path/'styles.csv').write_text('midi_filename,style\n' + ''.join(f'{path},{i % 2}\n' for i, path in enumerate(sorted(corpus.glob('loop*.mid')))))
    arguments = ['--from-filelist', tmp_path/'list', '-o', tmp_path/'model', '--store', request.param, '--save-every', 1, '--aux-key', 'style', '--aux-csv', tmp_path/'styles.csv', '--log-every', 0]
    said = command('train', *arguments, '--fail-fast', code=1)
    assert 'loop-0002 truncated' in said and 'truncated' in said and '--resume' in said
    return request.param, arguments, tmp_path/'model.checkpoints/shard-0-of-1.checkpoint'


def finished(arguments, folder, *how):
    "Resume; the model must be the uninterrupted one"
    command('train', *arguments, *(how or ['--resume']))
    plain = ['-o' if each == '-o' else folder/'reference' if each == folder/'model' else each for each in arguments]
    command('train', *plain)
    assert sha(folder/'model') == sha(folder/'reference')


def test_resume_of_another_run_says_what_differs(stopped, tmp_path):
    store, arguments, checkpoint = stopped
    before = sha(checkpoint)
    assert 'Use --resume' in command('train', *arguments, code=2)
    assert 'config.order: 8 on disk, 3 asked for' in command('train', *arguments, '--resume', '--order', 3, code=1)
    assert 'config.min_notes: 8 on disk, 9 asked for' in command('train', *arguments, '--resume', '--min-notes', 9, code=1)
    assert 'another file list' in command('train', *arguments, '--resume', '--max-files', 5, code=1)
    said = command('train', *arguments, '--resume-from', checkpoint, '--num-shards', 2, '--shard-index', 1, code=1)
    assert 'num_shards: 1 on disk, 2 asked for' in said and 'shard_index: 0 on disk, 1 asked for' in said
    other = dict(memory='sqlite', sqlite='memmap', memmap='memory')[store]
    assert f'--store {store}' in command('train', *arguments, '--resume', '--store', other, code=1)
    (tmp_path/'styles.csv').write_text((tmp_path/'styles.csv').read_text().replace(',1', ',2'))
    assert 'another metadata table' in command('train', *arguments, '--resume', code=1)
    (tmp_path/'styles.csv').write_text((tmp_path/'styles.csv').read_text().replace(',2', ',1'))
    assert sha(checkpoint) == before and not (tmp_path/'model').exists()
    finished(arguments, tmp_path)


def test_resume_from_a_copy_of_a_checkpoint(stopped, tmp_path):
    store, arguments, checkpoint = stopped
    checkpoint.rename(tmp_path/'elsewhere')
    assert 'an existing checkpoint' in command('train', *arguments, '--resume-from', tmp_path/'nowhere', code=2)
    if store != 'memory': assert 'Use --resume' in command('train', *arguments, code=2)  # its counts are there
    finished(arguments, tmp_path, '--resume-from', tmp_path/'elsewhere')
    assert (tmp_path/'elsewhere').exists()


def test_damaged_checkpoints_are_refused(stopped, tmp_path):
    store, arguments, checkpoint = stopped
    content = checkpoint.read_bytes()
    command('train', *arguments[:2], '-o', tmp_path/'other', '--log-every', 0)
    damaged = dict(empty=b'', pickle=pickle.dumps(dict(version=1)), text=b'hello\n', head=content[:50], half=content[:len(content) // 2], short=content[:-1],
        footer=content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], array=content[:64] + bytes([content[64] ^ 1]) + content[65:], model=(tmp_path/'other').read_bytes())
    for name, wrong in damaged.items():
        checkpoint.write_bytes(wrong)
        said = command('train', *arguments, '--resume', code=1)
        assert said.count('\n') == 1 and str(checkpoint) in said, (name, said)
        assert ('pickle' in said) == (name == 'pickle') and ('groove model' in said) == (name == 'model'), said
        assert checkpoint.read_bytes() == wrong and not (tmp_path/'model').exists()
    checkpoint.write_bytes(content)
    finished(arguments, tmp_path)


def test_damaged_counts_are_refused(corpus, tmp_path):
    "Run files of the memmap store and the database of the SQLite store"
    (tmp_path/'list').write_text('\n'.join(map(str, sorted(corpus.glob('loop*.mid')))))
    arguments = ['--from-filelist', tmp_path/'list', '--log-every', 0, '--save-every', 1]
    memmap, sqlite = [*arguments, '-o', tmp_path/'m', '--store', 'memmap'], [*arguments, '-o', tmp_path/'s', '--store', 'sqlite']
    for each in (memmap, sqlite): command('train', *each, '--fail-fast', code=1)
    run = max((tmp_path/'m.counts/runs').glob('ngram*.run'))
    content = run.read_bytes()
    for wrong in (None, b'', content[:-1], content[:100], pickle.dumps(1)):
        run.unlink() if wrong is None else run.write_bytes(wrong)
        said = command('train', *memmap, '--resume', code=1)
        assert said.count('\n') == 1 and str(run) in said, said
    run.write_bytes(content)
    command('train', *memmap, '--resume')
    for path in tmp_path.glob('s.sqlite-*'): path.unlink()
    content = (tmp_path/'s.sqlite').read_bytes()
    for wrong in (None, b'', b'x' * 5000, content[:1000], b'\0' * 100 + content[100:]):
        (tmp_path/'s.sqlite').unlink() if wrong is None else (tmp_path/'s.sqlite').write_bytes(wrong)
        said = command('train', *sqlite, '--resume', code=1)
        assert said.count('\n') == 1 and 's.sqlite' in said, said
        for path in tmp_path.glob('s.sqlite-*'): path.unlink()
    (tmp_path/'s.sqlite').write_bytes(content)
    command('train', *sqlite, '--resume')
    assert sha(tmp_path/'m') == sha(tmp_path/'s')


def test_a_flipped_bit_in_a_run_file_is_refused(corpus, tmp_path):
    (tmp_path/'list').write_text('\n'.join(map(str, sorted(corpus.glob('loop*.mid')))))
    arguments = ['--from-filelist', tmp_path/'list', '--log-every', 0, '--save-every', 1, '-o', tmp_path/'m', '--store', 'memmap']
    command('train', *arguments, '--fail-fast', code=1)
    run = max((tmp_path/'m.counts/runs').glob('ngram*.run'))
    content = run.read_bytes()
    run.write_bytes(content[:64] + bytes([content[64] ^ 1]) + content[65:])
    assert 'checksum' in command('train', *arguments, '--resume', code=1)


def test_odd_meta_json_is_refused(corpus, tmp_path):
    train(corpus, '-o', tmp_path/'m', '--store', 'memmap')
    for wrong in ('[]', '1', 'null', '{"schema_version": 2}', '{"schema_version": 2, "orders": 1}', '{"schema_version": 2, "orders": {"1": {}}}'):
        (tmp_path/'m.counts/meta.json').write_text(wrong)
        with pytest.raises(FormatError): read_order_shards(tmp_path/'m.counts', 1)


def test_a_shard_never_touches_the_counts_of_another(corpus, tmp_path):
    (tmp_path/'list').write_text('\n'.join(map(str, [*sorted(corpus.glob('loop-000[01].mid')), *sorted(corpus.glob('loop-0002*.mid'))])))
    arguments = ['--from-filelist', tmp_path/'list', '--log-every', 0, '--save-every', 1, '--store', 'memmap', '--memmap-dir', tmp_path/'counts', '--num-shards', 2, '--resume']
    command('train', *arguments, '-o', tmp_path/'even', '--fail-fast', code=1)
    before = sorted((tmp_path/'counts/runs').iterdir())
    command('train', *arguments, '-o', tmp_path/'odd', '--shard-index', 1, code=1)
    assert before and sorted((tmp_path/'counts/runs').iterdir()) == before


def test_damaged_meta_json_is_refused(corpus, tmp_path):
    train(corpus, '-o', tmp_path/'m', '--store', 'memmap')
    meta = tmp_path/'m.counts/meta.json'
    content = meta.read_text()
    for wrong in ('', '{', content[:-20], '{"schema_version": 1}', 'NaN', json.dumps({**json.loads(content), 'orders': {}})):
        meta.write_text(wrong)
        with pytest.raises(ValueError): read_order_shards(tmp_path/'m.counts', 1)
    meta.unlink()
    with pytest.raises(FormatError, match='did not finish'): read_order_shards(tmp_path/'m.counts', 1)


@pytest.fixture
def read_only(tmp_path):
    "A directory that cannot be written to, for root neither"
    folder = tmp_path/'read only'
    folder.mkdir()
    with ExitStack() as stack:
        if os.geteuid(): folder.chmod(0o555)
        elif subprocess.run(['mount', '-t', 'tmpfs', '-o', 'ro', 'tmpfs', folder], capture_output=True).returncode: pytest.skip('root may write anywhere, and nothing can be mounted here')
        else: stack.callback(subprocess.run, ['umount', folder], check=True)
        yield folder


def test_places_that_cannot_be_written(corpus, tmp_path, read_only):
    (tmp_path/'file').write_text('keep me')
    for place in (read_only, tmp_path/'file'):
        for arguments in (['-o', place/'model'], ['-o', tmp_path/'m', '--checkpoint-dir', place/'x'], ['-o', tmp_path/'m', '--store', 'memmap', '--memmap-dir', place/'x'],
                ['-o', tmp_path/'m', '--store', 'sqlite', '--db-path', place/'x'], ['-o', place/'model', '--checkpoint-dir', tmp_path/'checkpoints', '--store', 'memmap', '--memmap-dir', tmp_path/'c']):
            said = train(corpus, *arguments, '--resume', code=1)
            assert said.count('\n') == 1 and str(place) in said, said
    assert (tmp_path/'file').read_text() == 'keep me' and not (tmp_path/'m').exists()
    for wrong in (tmp_path, '/dev/null'): assert 'a regular file or a new name' in train(corpus, '-o', wrong, '--checkpoint-dir', tmp_path/'checkpoints', '--resume', code=2)


def test_a_database_of_another_program_is_left_alone(corpus, tmp_path):
    for name, table in (('a.db', 'progress (x)'), ('b.db', 'precious (x)')):
        with sqlite3.connect(tmp_path/name) as database: database.execute(f'CREATE TABLE {table}')
        database.close()
        before = sha(tmp_path/name)
        said = train(corpus, '-o', tmp_path/'m', '--store', 'sqlite', '--db-path', tmp_path/name, code=1)
        assert said.count('\n') == 1 and name in said and sha(tmp_path/name) == before
    (tmp_path/'notes.db').write_bytes(b'no database at all')
    assert 'not a database' in train(corpus, '-o', tmp_path/'m', '--store', 'sqlite', '--db-path', tmp_path/'notes.db', code=1)
    assert (tmp_path/'notes.db').read_bytes() == b'no database at all'
    assert 'unable to open' in train(corpus, '-o', tmp_path/'m', '--store', 'sqlite', '--db-path', tmp_path, code=1)


def test_a_finished_model_of_other_files_is_not_taken_for_done(corpus, tmp_path):
    train(corpus, '-o', tmp_path/'m')
    write_drum_corpus(tmp_path/'other', 7, seed=1)
    for path in corpus.iterdir():
        if not (tmp_path/'other'/path.name).exists(): shutil.copy(path, tmp_path/'other')
    command('train', tmp_path/'other', '-o', tmp_path/'m', '--resume', code=1)


def test_a_finished_model_with_other_labels_is_not_taken_for_done(corpus, tmp_path):
    names = [path.name for path in sorted(corpus.glob('loop*.mid'))]
    shutil.copytree(corpus, tmp_path/'c')
    for style in ('rock', 'jazz'): (tmp_path/f'{style}.csv').write_text('midi_filename,style\n' + ''.join(f'c/{name},{style}\n' for name in names))
    train(tmp_path/'c', '-o', tmp_path/'m', '--aux-key', 'style', '--aux-csv', tmp_path/'rock.csv')
    command('train', tmp_path/'c', '-o', tmp_path/'m', '--aux-key', 'style', '--aux-csv', tmp_path/'jazz.csv', '--resume', code=1)


def test_a_finished_model_of_another_run_is_not_taken_for_done(corpus, tmp_path):
    "Two models that share a directory of checkpoints"
    train(corpus, '-o', tmp_path/'one', '--checkpoint-dir', tmp_path/'checkpoints')
    train(corpus, '-o', tmp_path/'other', '--order', 3)
    before = sha(tmp_path/'other')
    done = CliRunner().invoke(app, ['train', str(corpus), '-o', str(tmp_path/'other'), '--checkpoint-dir', str(tmp_path/'checkpoints'), '--resume', '--log-every', '0'])
    assert done.exit_code == 1 or sha(tmp_path/'other') == sha(tmp_path/'one') != before


def test_merging_a_checkpoint_whose_counts_are_gone_is_refused(corpus, tmp_path):
    (tmp_path/'list').write_text('\n'.join(map(str, sorted(corpus.glob('loop*.mid')))))
    for store in ('memmap', 'sqlite'):
        arguments = ['--from-filelist', tmp_path/'list', '--log-every', 0, '--save-every', 1, '-o', tmp_path/store, '--store', store]
        command('train', *arguments, '--fail-fast', code=1)
        checkpoint = tmp_path/f'{store}.checkpoints/shard-0-of-1.checkpoint'
        command('merge', checkpoint, '-o', tmp_path/'whole')
        for path in tmp_path.glob(f'{store}.*'):
            if 'checkpoints' in path.name: continue
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        assert 'which is not there' in command('merge', checkpoint, '-o', tmp_path/'x', code=1)
        assert not (tmp_path/'x').exists() and not list(tmp_path.glob(f'{store}.counts')) and not list(tmp_path.glob(f'{store}.sqlite'))


def test_a_finished_run_never_touches_the_counts_of_another(corpus, tmp_path):
    (tmp_path/'list').write_text('\n'.join(map(str, sorted(corpus.glob('loop*.mid')))))
    train(corpus, '-o', tmp_path/'done')
    other = ['--from-filelist', tmp_path/'list', '--log-every', 0, '--save-every', 1, '-o', tmp_path/'other', '--store', 'memmap', '--memmap-dir', tmp_path/'counts']
    command('train', *other, '--fail-fast', code=1)
    before = sorted((tmp_path/'counts/runs').iterdir())
    assert 'another file list' in command('train', corpus, '-o', tmp_path/'done', '--store', 'memmap', '--memmap-dir', tmp_path/'counts', '--resume', code=1)
    assert before and sorted((tmp_path/'counts/runs').iterdir()) == before


def test_a_finished_run_may_be_started_again(corpus, tmp_path):
    for store in ('memory', 'memmap', 'sqlite'):
        train(corpus, '-o', tmp_path/store, '--store', store)
        first = sha(tmp_path/store)
        train(corpus, '-o', tmp_path/store, '--store', store)
        assert sha(tmp_path/store) == first == sha(tmp_path/'memory')


def test_names_that_look_like_line_ends_survive_a_merge(corpus, tmp_path):
    (tmp_path/'list').write_text('\n'.join([*map(str, sorted(corpus.glob('loop*.mid'))), str(tmp_path/'no\u2028such.mid'), str(tmp_path/'nor\x85this.mid')]))
    for k in range(2): command('train', '--from-filelist', tmp_path/'list', '--log-every', 0, '-o', tmp_path/f'{k}', '--num-shards', 2, '--shard-index', k)
    command('merge', tmp_path/'0', tmp_path/'1', '-o', tmp_path/'both')
    assert [json.loads(line)['reason'] for line in (tmp_path/'both.skipped.jsonl').read_text().split('\n') if line].count('missing') == 2
    (tmp_path/'0.skipped.jsonl').write_text('{damaged')
    assert 'is damaged' in command('merge', tmp_path/'0', tmp_path/'1', '-o', tmp_path/'x', code=1) and not (tmp_path/'x').exists()


def test_a_memory_limit_binds(small_store):
    "The memmap store stays below its limit, whatever is counted, and writes to disk instead"
    store, limit = small_store, 3_000_000
    rng, most = np.random.default_rng(0), 0
    for _ in range(60):
        store.add('ngram', rng.integers(0, 2**63, (20_000, 1)).astype(np.uint64))
        most = max(most, store.bytes)
    assert most < 2 * limit and sum(rows for _, rows in store.files['ngram']) > 1_000_000
    assert sum(int(counts.sum()) for _, counts in store.blocks('ngram')) == 60 * 20_000


@pytest.fixture
def small_store(tmp_path):
    store = MemmapStore(tmp_path/'counts', lambda name: KeyLayout((32, 32)), buckets=1 << 14, memory_bytes=3_000_000)
    yield store
    store.close()
