"""Data sets survive: killed at every durable step, interrupted, crashed by the plugin, out of disk or meddled with, they resume to the same bytes or say why not."""
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest

from datatools.core import DatatoolsError, FormatError, LockedError, MismatchError, UsageError
from datatools.jobs import Engine, InlineEngine, call
from datatools.vst import ChunkedDatasetReader
from datatools.vst.chunks import CAUSES, CONTENT
from datatools.vst.config import make_config
from datatools.vst.generate import draw, generate, plan
from datatools.vst.host import load_instrument
from datatools.vst.isolation import in_process
from datatools.vst.params import Categorical, ParamSpec, draft_spec, load_param_set

ROOT = Path(__file__).resolve().parent.parent
SHORT = dict(sample_rate=16_000, duration_seconds=.5)
BESIDES = {'manifest.json', 'throughput.jsonl', '.lock', '.chunks.lock'}
CHOICES = ['None', 'Segfault', 'Abort', 'Exit', 'Hang', 'NaN', 'Silence', 'Leak']  # of the test instrument's Misbehave
CAUSE_OF = dict(Segfault='crash', Abort='crash', Exit='crash', Hang='timeout', NaN='not_finite', Silence='silent')


def config(folder, **settings): return make_config(dict(SHORT, output_dir=str(folder), **settings))
def make(folder, resume=False, engine=None, **settings): return generate(config(folder, **settings), resume, engine=engine or InlineEngine())


def chunks(folder):
    "File name -> hash of the chunk files; a data set that is complete has nothing else but its manifest and its locks"
    found = {path.name: path for path in Path(folder).iterdir()}
    files = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(found.items()) if name.endswith('.h5')}
    assert {*found} - {*files} <= BESIDES, f'left behind: {({*found} - {*files}) - BESIDES}'
    return files


def samples(folder):
    "Everything that is stored of each sample, in order"
    rows = []
    for path in sorted(Path(folder).glob('*.h5')):
        with h5py.File(path) as file: columns = [file[name][:] for name in (*CONTENT, 'parameters')]
        rows += [tuple(hashlib.sha256(np.ascontiguousarray(column[row])).digest() if column.dtype != object else column[row] for column in columns) for row in range(len(columns[0]))]
    return rows


def done_count(folder):
    "Samples that are safe, in finished and in partial chunks"
    count = 0
    for path in Path(folder).glob('dataset_*.h5*'):
        if path.suffix == '.partial' and path.with_suffix('').exists(): continue
        with h5py.File(path) as file: count += int(file['done'][:].sum())
    return count


@pytest.fixture
def quick(tmp_path):
    "A directory in memory where there is one: thousands of fsyncs cost nothing there"
    with tempfile.TemporaryDirectory(dir='/dev/shm' if os.access('/dev/shm', os.W_OK) else tmp_path) as folder: yield Path(folder)


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    "20 samples of the synth that is built in, made one after the other"
    folder = tmp_path_factory.mktemp('reference')
    make(folder, num_samples=20, samples_per_file=9)
    return folder


# --- the same samples however they are made


class Shuffled(Engine):
    "Runs the calls in a random order"
    def __init__(self, seed):
        super().__init__(workers=2)
        self.waiting, self.random = [], random.Random(seed)

    def submit(self, token, function, arguments): self.waiting.append((token, function, arguments))

    def collect(self, block):
        if not block or len(self.waiting) < 1: return []
        token, function, arguments = self.waiting.pop(self.random.randrange(len(self.waiting)))
        return [(token, call(function, arguments))]


@pytest.mark.parametrize('workers', [1, 3])
def test_workers_do_not_matter(reference, tmp_path, workers):
    summary = generate(config(tmp_path/'set', num_samples=20, samples_per_file=9, num_workers=workers))
    assert summary['complete'] and summary['rendered_now'] == 20
    assert chunks(tmp_path/'set') == chunks(reference)


@pytest.mark.parametrize('seed', range(3))
def test_order_does_not_matter(reference, tmp_path, seed):
    assert make(tmp_path/'set', engine=Shuffled(seed), num_samples=20, samples_per_file=9)['complete']
    assert chunks(tmp_path/'set') == chunks(reference)


@pytest.mark.parametrize('settings', [dict(samples_per_file=1), dict(samples_per_file=7), dict(samples_per_file=100), dict(compression='blosc2'),
                                      dict(isolation='state'), dict(isolation='none')], ids=str)
def test_neither_chunks_nor_compression_nor_isolation_change_a_sample(reference, tmp_path, settings):
    make(tmp_path/'set', num_samples=20, **{'samples_per_file': 9, **settings})
    assert samples(tmp_path/'set') == samples(reference)


def test_a_larger_set_begins_with_the_smaller_and_a_seed_changes_all(reference, tmp_path):
    make(tmp_path/'more', num_samples=25, samples_per_file=9)
    assert samples(tmp_path/'more')[:20] == samples(reference)
    make(tmp_path/'other', num_samples=20, samples_per_file=9, seed=1)
    assert not {*samples(tmp_path/'other')} & {*samples(reference)}


def test_the_final_chunk_is_damaged_or_removed(reference, tmp_path):
    shutil.copytree(reference, folder := tmp_path/'set')
    last = folder/'dataset_0002.h5'
    last.unlink()
    assert make(folder, resume=True, num_samples=20, samples_per_file=9)['rendered_now'] == 2
    assert chunks(folder) == chunks(reference)
    for damage in (lambda content: content[:-1000], lambda content: content[:100], lambda content: b'', lambda content: b'x' * 5000):
        last.write_bytes(damage((reference/last.name).read_bytes()))
        with pytest.raises(FormatError, match='dataset_0002.h5.*is damaged.*[Rr]emove it'): make(folder, resume=True, num_samples=20, samples_per_file=9)
    last.unlink()
    make(folder, resume=True, num_samples=20, samples_per_file=9)
    assert chunks(folder) == chunks(reference)


# --- killed at any step
# One process loads everything once and forks a child for every run, so that hundreds of kills fit into seconds.
# A step is anything that lasts: opening a file to write, writing, renaming, deleting, fsync, a fork; each is a place to die before and after.

DRIVER = '''
import ctypes, hashlib, itertools, json, os, resource, shutil, signal, sys, time, traceback
from pathlib import Path
import h5py, psutil
from datatools.jobs import InlineEngine
from datatools.vst.config import make_config
from datatools.vst.generate import generate

job = json.loads(sys.argv[1])
scratch, output = Path(job['scratch']), Path(job['scratch'])/'set'
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: what a killed run leaves behind becomes ours, and is counted


def watch(kill_at, log):
    "Number the steps of this process; die at one of them"
    count, me = itertools.count(1), os.getpid()

    def step(what):
        if os.getpid() != me: return  # a rendering
        number = next(count)
        os.write(log, (what + os.linesep).encode())
        if number == kill_at: os.kill(me, signal.SIGKILL)

    def hook(event, arguments):
        if event == 'open' and isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT): step(f'open {arguments[0]}')
        elif event in ('os.rename', 'os.remove', 'os.mkdir', 'os.truncate', 'fcntl.flock'): step(f'{event} {arguments[:1]}')

    def watched(name, torn=False):
        original = getattr(os, name)
        def replacement(*arguments):
            step(f'before {name}')
            if torn and len(arguments[1]) > 1:
                original(arguments[0], arguments[1][:len(arguments[1]) // 2], *arguments[2:])
                step(f'half {name}')
            try: return original(*arguments)
            finally: step(f'after {name}')
        setattr(os, name, replacement)
    for name in ('fsync', 'fork', 'ftruncate', 'posix_fallocate'): watched(name)
    watched('pwrite', torn=True)
    sys.addaudithook(hook)


def run(resume=False, kill_at=None, limit=None, deadly=False, log='log'):
    "Generate in a forked child: (exit code, or minus the signal that ended it; summary; renderings begun)"
    child = os.fork()
    if child == 0:
        errors = os.open(scratch/'errors', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2): os.dup2(errors, stream)
        if limit is None: watch(kill_at, os.open(scratch/log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL if deadly else signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        code = 99
        if limit is not None: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            summary = generate(make_config(dict(job['config'], output_dir=str(output))), resume, show_progress=False, engine=InlineEngine())
            if limit is None: (scratch/'summary').write_text(json.dumps(summary))
            code = 0 if summary['complete'] else 1
            if code: print(summary)
        except Exception as error:
            print(f'{type(error).__name__}: {error}')
            code = 1
        sys.stdout.flush()
        os._exit(code)
    _, status = os.waitpid(child, 0)
    code = -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    if code < 0: gone()
    lines = (scratch/log).read_text().splitlines() if limit is None else []
    return code, json.loads((scratch/'summary').read_text()) if code == 0 and limit is None else None, lines


def gone():
    "Wait until all renderings of a killed run have died, too"
    deadline = time.monotonic() + 5
    while psutil.Process().children():
        try: os.waitpid(-1, os.WNOHANG)
        except ChildProcessError: break
        assert time.monotonic() < deadline, 'a rendering outlives the run'
        time.sleep(.001)


def done():
    count = 0
    for path in output.glob('dataset_*.h5*'):
        if path.suffix == '.partial' and path.with_suffix('').exists(): continue
        with h5py.File(path) as file: count += int(file['done'][:].sum())
    return count


def begun(lines): return sum(line == 'after fork' for line in lines)
def errors(): return (scratch/'errors').read_text(errors='replace')
def clear(): shutil.rmtree(output, ignore_errors=True)
def files():
    names = sorted(path.name for path in output.iterdir())
    return {name: hashlib.sha256((output/name).read_bytes()).hexdigest() for name in names if name.endswith('.h5')}, [name for name in names if not name.endswith(('.h5', '.jsonl'))]


if job['plugin']:  # renderings of a plugin need a plugin that is loaded in the process that forks: each run loads its own
    job['config']['plugin_path'] = job['plugin']
else: generate(make_config(dict(job['config'], output_dir=str(output))), show_progress=False, engine=InlineEngine())  # loads and keeps compiled code
clear()
code, summary, steps = run()
assert code == 0, errors()
expected, renderings, total = files(), begun(steps), summary['samples']
most = max(int(count) for count in job['attempts']) if job.get('attempts') else 2
failures, tried = [], 0

if job['mode'] == 'kill':
    for at in range(job['first'], len(steps) + 1, job['stride']):
        clear()
        tried += 1
        name, again = f'step {at} of {len(steps)}: {steps[at - 1]}', 0
        code, _, lines = run(kill_at=at)
        safe, rendered = done(), begun(lines)
        if code != -signal.SIGKILL: failures.append([name, 'was not killed', code, errors()[-600:]])
        if tried % 3 == 0:  # and once more
            _, _, lines = run(resume=True, kill_at=at % 40 + 3)
            safe, rendered, again = done(), rendered + begun(lines), 1
        code, summary, lines = run(resume=True)
        if code or files() != expected: failures.append([name, code, files(), errors()[-600:]])
        elif summary['rendered_now'] != total - safe: failures.append([name, 'rendered', summary['rendered_now'], 'of', total, 'safe', safe])
        elif rendered + begun(lines) > renderings + 1 + again: failures.append([name, 'renderings', rendered, begun(lines), 'of', renderings])
else:
    largest = max(path.stat().st_size for path in output.iterdir())
    for limit in [int(largest * 1.3 * i / job['limits']) for i in range(job['limits'])]:
        for deadly in (False, True):
            clear()
            tried += 1
            name = f'file size limit {limit} of {largest}, deadly {deadly}'
            code, _, _ = run(limit=limit, deadly=deadly)
            said = errors()
            if code not in (0, -signal.SIGXFSZ if deadly else 1): failures.append([name, code, said[-600:]])
            elif code == 1 and limit > 2000 and ('File too large' not in said or said.count(chr(10)) != 1): failures.append([name, code, said[-600:]])
            safe = done()
            code, summary, _ = run(resume=True)
            if code or files() != expected: failures.append([name, code, files(), errors()[-600:]])
            elif summary['rendered_now'] != total - safe: failures.append([name, 'rendered', summary['rendered_now'], 'safe', safe])
print(chr(10) + json.dumps(dict(tried=tried, steps=len(steps), failures=failures)))
'''


def drive(folder, timeout=120, plugin='', **job):
    "Run the driver; the number of places tried"
    (folder/'drive.py').write_text(DRIVER)
    job = dict(job, plugin=str(plugin), scratch=str(folder))
    done = subprocess.run([sys.executable, folder/'drive.py', json.dumps(job)], capture_output=True, text=True, cwd=ROOT, timeout=timeout)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert not found['failures'], '\n'.join(map(str, found['failures'][:5]))
    return found['tried']


FEW = dict(SHORT, num_samples=5, samples_per_file=3)


def test_killed_at_any_step(quick): assert drive(quick, mode='kill', first=1, stride=17, config=FEW) > 10


@pytest.mark.drill
@pytest.mark.parametrize('settings', [dict(isolation='fork'), dict(isolation='state'), dict(compression='blosc2')], ids=str)
def test_killed_at_every_step(quick, settings): assert drive(quick, 1800, mode='kill', first=1, stride=1, config={**FEW, **settings}) > 100


def test_files_that_may_not_grow(quick):
    "No file may grow beyond a limit: an error, or death in the middle of a write; with room again the set is completed to the same bytes"
    assert drive(quick, mode='full', limits=5, config=FEW) == 10


@pytest.mark.drill
def test_files_that_may_not_grow_at_many_sizes(quick): drive(quick, 1800, mode='full', limits=40, config=FEW)


# --- whole processes: workers, and the renderings that they fork

COUNTER = '''
import os, sys
def count(event, arguments):
    if event == 'os.fork': os.write(log, b'f')
log = os.open(os.environ['RENDERINGS'], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
sys.addaudithook(count)
'''


class Run:
    "A command that renders, in a process group of its own; its processes are known by a mark in their environment"
    def __init__(self, folder, settings, *arguments):
        self.mark, self.log = uuid.uuid4().hex, folder/'renderings'
        (folder/'sitecustomize.py').write_text(COUNTER)
        self.before = self.renderings
        (folder/'config.yaml').write_text(json.dumps(settings))
        environment = dict(os.environ, RUN_MARK=self.mark, RENDERINGS=str(self.log), PYTHONPATH=str(folder))
        command = [sys.executable, '-m', 'datatools.vst', 'generate', '--config', folder/'config.yaml', '--json', *arguments]
        self.process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment, start_new_session=True)

    @property
    def renderings(self): return self.log.stat().st_size if self.log.exists() else 0

    def processes(self):
        "Of this run, as long as they live"
        found = []
        for process in psutil.process_iter():
            try: marked = process.status() != psutil.STATUS_ZOMBIE and process.environ().get('RUN_MARK') == self.mark
            except (psutil.NoSuchProcess, psutil.AccessDenied): continue
            if marked: found.append(process)
        return found

    def workers(self): return [process for process in self.processes() if process.ppid() == self.process.pid and 'spawn_main' in ' '.join(process.cmdline())]

    def rendered(self, count, seconds=60):
        "Wait until so many renderings have begun, or the run is over"
        wait_until(lambda: self.renderings - self.before >= count or self.process.poll() is not None, seconds)

    def end(self, code=0, seconds=120):
        "Wait for the end: what it printed; no process of it may be left"
        out, errors = self.process.communicate(timeout=seconds)
        assert self.process.returncode == code, (self.process.returncode, errors[-2000:])
        wait_until(lambda: not self.processes(), 5)
        return json.loads(out) if code == 0 else errors


def wait_until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, 'nothing happened for too long'
        time.sleep(.002)


@pytest.fixture
def run(quick):
    "Start a command: `run('--resume', num_samples=5)`"
    started = []
    def start(*arguments, **settings):
        started.append(Run(quick, dict(SHORT, output_dir=str(quick/'set'), **settings), *arguments))
        return started[-1]
    yield start
    for each in started:
        for process in each.processes(): process.kill()
        each.process.communicate()


SOME = dict(num_samples=20, samples_per_file=9, num_workers=2)


def test_the_parent_is_killed_again_and_again(run, quick, reference):
    "Killed in the middle several times; what was done is never done again but for one sample of each worker"
    rng, renderings, kills = random.Random(4), 0, 0
    for begun in (0, 1, 7, 4):
        before, killed = done_count(quick/'set'), run('--resume', **SOME)
        if begun: killed.rendered(begun)
        time.sleep(rng.random() * (.5 if begun == 0 else .02))
        killed.process.kill()
        killed.end(code=-signal.SIGKILL)
        kills += begun > 0
    safe = done_count(quick/'set')
    assert 0 < safe < 20, safe
    assert run('--resume', **SOME).end()['rendered_now'] == 20 - safe
    assert chunks(quick/'set') == chunks(reference)
    once = 20 + sum(int(row) for path in reference.glob('*.h5') for row in h5py.File(path)['attempt'][:])
    assert (quick/'renderings').stat().st_size <= once + 2 * kills


def test_a_worker_and_a_rendering_are_killed(run, quick, reference):
    going = run(**SOME)
    going.rendered(4)
    going.workers()[0].kill()
    going.rendered(8)
    for worker in going.workers():
        for rendering in worker.children(): rendering.kill()
    summary = going.end()
    assert summary['complete'] and not summary['rejections'] and chunks(quick/'set') == chunks(reference)


def test_interrupted(run, quick, reference):
    going = run(**SOME)
    going.rendered(5)
    os.killpg(going.process.pid, signal.SIGINT)  # as the terminal does
    said = going.end(code=130)
    assert 'Interrupted. Every sample that was finished is safe' in said and '--resume' in said and 'Traceback' not in said
    safe = done_count(quick/'set')
    assert 0 < safe < 20 and run('--resume', **SOME).end()['rendered_now'] == 20 - safe
    assert chunks(quick/'set') == chunks(reference)


def test_two_runs_in_one_directory(run, quick, reference):
    first = run(**SOME)
    first.rendered(1)
    first.process.send_signal(signal.SIGSTOP)
    said = run('--resume', **SOME).end(code=1)
    assert '.lock is held by process' in said and said.count('\n') == 1
    first.process.send_signal(signal.SIGCONT)
    first.end()
    assert chunks(quick/'set') == chunks(reference)


@pytest.mark.drill
@pytest.mark.parametrize('isolation', ['fork', 'state'])
def test_the_parent_is_killed_every_20_milliseconds(run, quick, tmp_path, isolation):
    "At each moment of a whole run, from a fresh start each time"
    settings = dict(SOME, isolation=isolation)
    make(tmp_path/'reference', **{**settings, 'num_workers': 1})
    expected, begun = chunks(tmp_path/'reference'), time.monotonic()
    run(**settings).end()
    seconds = time.monotonic() - begun
    for moment in np.arange(.3, seconds + .1, .02):
        shutil.rmtree(quick/'set')
        killed = run(**settings)
        time.sleep(moment)
        killed.process.kill()
        killed.process.wait()
        killed.end(code=killed.process.returncode)
        safe = done_count(quick/'set')
        if not (quick/'set'/'manifest.json').exists() or safe < 20: assert run('--resume', **settings).end()['rendered_now'] == 20 - safe, moment
        else: run('--resume', **settings).end()
        assert chunks(quick/'set') == expected, moment
