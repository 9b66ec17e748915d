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
import time
import uuid
from collections import Counter
from functools import lru_cache
from importlib import import_module
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
from mido import Message, MidiFile, MidiTrack

from datatools.core import DatatoolsError, FormatError, MismatchError, UsageError, rng_for, rss_bytes
from datatools.jobs import Engine, InlineEngine, call
from datatools.vst import ChunkedDatasetReader
from datatools.vst.chunks import CAUSES, CONTENT
from datatools.vst.config import make_config
from datatools.vst.generate import draw, generate, plan
from datatools.vst.host import load_instrument
from datatools.vst.isolation import ForkIsolation, in_process, probe_instrument
from datatools.vst.params import Categorical, ParamSpec, draft_spec, load_param_set

generating = import_module('datatools.vst.generate')
ROOT = Path(__file__).resolve().parent.parent
SHORT = dict(sample_rate=16_000, duration_seconds=.5)
BESIDES = {'manifest.json', 'phrases.json', 'throughput.jsonl', '.lock'}
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


@pytest.fixture(autouse=True, scope='module')
def looked_at_once():
    "To look at a plugin takes a new process each time; here its files do not change, but for tests that ask again"
    original, generating.probe_instrument = generating.probe_instrument, lru_cache(generating.probe_instrument)
    yield generating.probe_instrument
    generating.probe_instrument = original


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

    def collect(self, seconds):
        if seconds == 0 or len(self.waiting) < 1: return []
        token, function, arguments = self.waiting.pop(self.random.randrange(len(self.waiting)))
        return [(token, call(function, arguments))]


@pytest.mark.parametrize('workers', [3, *(pytest.param(workers, marks=pytest.mark.drill) for workers in (1, 2, 8))])
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
    deadline = time.monotonic() + 30
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


def test_killed_at_any_step(quick): assert drive(quick, mode='kill', first=3, stride=23, config=FEW) > 9


@pytest.mark.drill
@pytest.mark.parametrize('settings', [dict(isolation='fork'), dict(isolation='state'), dict(compression='blosc2')], ids=str)
def test_killed_at_every_step(quick, settings): assert drive(quick, 1800, mode='kill', first=1, stride=1, config={**FEW, **settings}) > 100


def test_files_that_may_not_grow(quick):
    "No file may grow beyond a limit: an error, or death in the middle of a write; with room again the set is completed to the same bytes"
    assert drive(quick, mode='full', limits=4, config=FEW) == 8


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
        assert self.process.returncode in (code, -signal.SIGINT if code == 130 else code), (self.process.returncode, errors[-2000:])
        wait_until(lambda: not self.processes())
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
    "Killed in the middle, and again; what was done is never done again but for one sample of each worker"
    rng, kills = random.Random(4), 0
    for begun in (0, 1, 7):
        killed = run('--resume', **SOME)
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


def test_interrupted_and_two_at_once(run, quick, reference):
    going = run(**SOME)
    going.rendered(3)
    going.process.send_signal(signal.SIGSTOP)
    said = run('--resume', **SOME).end(code=1)
    assert '.lock is held by process' in said and said.count('\n') == 1
    os.killpg(going.process.pid, signal.SIGINT)  # as the terminal does
    going.process.send_signal(signal.SIGCONT)
    said = going.end(code=130)
    assert 'Interrupted. Every sample that was finished is safe' in said and '--resume' in said and 'Traceback' not in said
    safe = done_count(quick/'set')
    assert 0 < safe <= 20 and run('--resume', **SOME).end()['rendered_now'] == 20 - safe
    assert chunks(quick/'set') == chunks(reference)


@pytest.mark.drill
@pytest.mark.parametrize('isolation', ['fork', 'state'])
def test_the_parent_is_killed_every_100_milliseconds(run, quick, tmp_path, isolation):
    "At each moment of a whole run, from a fresh start each time"
    settings = dict(SOME, isolation=isolation)
    make(tmp_path/'reference', **{**settings, 'num_workers': 1})
    expected, begun = chunks(tmp_path/'reference'), time.monotonic()
    run(**settings).end()
    seconds = time.monotonic() - begun
    for moment in np.arange(.3, seconds + .1, .1):
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


# --- a plugin that fails


@pytest.fixture(scope='session')
def drafted(test_plugin):
    "The parameters of the test instrument over their whole range, with neither leakage nor chance nor misbehaviour"
    def choose(parameter):
        kept = dict(leakage='None', nondeterministic='Off', misbehave='None').get(parameter.name)
        return parameter if kept is None else Categorical(parameter.name, parameter.values, parameter.raw_values, [float(value == kept) for value in parameter.values])
    spec = draft_spec('drafted', probe_instrument(test_plugin, details=True)['parameters'])
    return ParamSpec('drafted', [choose(parameter) for parameter in spec.parameters], spec.note)


def param_set(spec, folder, name='set', **weights):
    "A file of parameters in which choices have these weights: `misbehave=dict(Segfault=.01)`, the rest None or Off"
    def weighted(parameter):
        if parameter.name not in weights: return parameter
        given = weights[parameter.name]
        shares = [given.get(str(value), 0.) for value in parameter.values]
        if not sum(shares) >= 1: shares[0] = 1 - sum(shares)
        return Categorical(parameter.name, parameter.values, parameter.raw_values, shares)
    path = folder/f'{name}.yaml'
    ParamSpec(spec.name, [weighted(parameter) for parameter in spec.parameters], spec.note).to_yaml(path)
    return str(path)


def cause_drawn(job, index, attempt):
    "What goes wrong with an attempt, as its parameters ask for"
    choice = CHOICES[round(draw(job, index, attempt).patch.parameters['misbehave'] * 7)]
    return CAUSE_OF.get(choice, ''), choice


def test_crashes_and_hangs_cost_one_attempt_each(test_plugin, drafted, tmp_path):
    "All samples are there; each rejection is the one that the parameters asked for, with any number of workers"
    weights = dict(Segfault=.01, Hang=.01, Abort=.02, Exit=.02, NaN=.03, Silence=.03, Leak=.03)
    settings = dict(num_samples=60, samples_per_file=25, plugin_path=str(test_plugin), param_set=param_set(drafted, tmp_path, misbehave=weights), timeout_seconds=3, seed=33)
    summaries = [make(tmp_path/'1', **settings), generate(config(tmp_path/'2', num_workers=2, **settings))]
    job, _ = plan(config(tmp_path/'unused', **settings))
    expected, choices = [], Counter()
    with ChunkedDatasetReader(tmp_path/'1') as reader: attempts = [sample['attempt'] for sample in reader]
    for index, attempt in enumerate(attempts):
        drawn = [cause_drawn(job, index, number) for number in range(attempt + 1)]
        choices.update(choice for _, choice in drawn)
        assert drawn[-1][0] == ''
        expected.append(Counter(cause or 'silent' for cause, _ in drawn[:-1]))  # a patch can be silent without misbehaving
    assert {*CHOICES} <= {*choices}, f'choose another seed: {choices}'
    stored = np.concatenate([h5py.File(path)['rejections'][:] for path in sorted((tmp_path/'1').glob('*.h5'))])
    assert stored.tolist() == [[rejected[cause] for cause in CAUSES] for rejected in expected]
    for summary in summaries:
        assert summary['complete'] and summary['rendered_now'] == 60 and not summary['given_up'] and not summary['failed_blocks']
        assert summary['rejections'] == {cause: count for cause in CAUSES if (count := sum(rejected[cause] for rejected in expected))}
    assert chunks(tmp_path/'1') == chunks(tmp_path/'2')


def memory_of_leaks(path, spec):
    "In a process of its own: growth of its resident memory, in bytes, over 12 renderings that leak 50 MiB each"
    isolation, patch = ForkIsolation(load_instrument(path), .5, 16_000), spec.sample(rng_for(0, 'leak'))
    sizes = []
    for _ in range(13):
        assert not isolation.render({**patch.parameters, 'misbehave': 1.}, [patch.note._replace(start=0., end=.3)]).fault
        sizes.append(rss_bytes())
    return sizes[-1] - sizes[0]


def test_what_a_plugin_leaks_goes_with_its_fork(test_plugin, drafted):
    assert in_process(memory_of_leaks, str(test_plugin), drafted, named='leak') < 5e6


@pytest.mark.parametrize('choice, cause', [('Segfault', 'crash'), ('NaN', 'not_finite'), ('Silence', 'silent'), ('Hang', 'timeout')])
def test_nothing_but_failures(test_plugin, drafted, tmp_path, choice, cause):
    settings = dict(num_samples=50, plugin_path=str(test_plugin), param_set=param_set(drafted, tmp_path, misbehave={choice: 1.}), max_attempts=2, timeout_seconds=.1 if choice == 'Hang' else 20)
    with pytest.raises(DatatoolsError, match=f'The first 16 samples could not be made: of 32 draws, 32 {cause}'): make(tmp_path/'set', **settings)
    assert not list((tmp_path/'set').glob('[!.]*')), 'a run that made nothing leaves nothing in the way of the next'


def test_some_samples_are_given_up(test_plugin, drafted, tmp_path):
    "The others are there; more attempts complete the set, to the bytes of a run that had them from the start"
    settings = dict(num_samples=24, samples_per_file=8, plugin_path=str(test_plugin), param_set=param_set(drafted, tmp_path, misbehave=dict(Segfault=.3)))
    summary = make(tmp_path/'set', max_attempts=1, **settings)
    assert not summary['complete'] and summary['rendered_now'] and summary['rendered_now'] + len(summary['given_up']) == 24
    assert {*map(str, summary['given_up'].values())} == {"{'crash': 1}", "{'silent': 1}"}
    again = make(tmp_path/'set', resume=True, **settings)
    assert again['complete'] and again['rendered_now'] == 24 - summary['rendered_now']
    make(tmp_path/'whole', **settings)
    assert chunks(tmp_path/'set') == chunks(tmp_path/'whole')


@pytest.mark.parametrize('isolation', ['state', pytest.param('none', marks=pytest.mark.drill)])
def test_a_crash_without_a_fork_costs_the_worker(test_plugin, drafted, tmp_path, isolation):
    "The run survives: other blocks are made, and so are the samples before the crash; it says what happened"
    settings = dict(num_samples=24, plugin_path=str(test_plugin), param_set=param_set(drafted, tmp_path, misbehave=dict(Segfault=.03)), isolation=isolation, seed=2)
    job, _ = plan(config(tmp_path/'unused', **settings))
    assert [index for index in range(24) if cause_drawn(job, index, 0)[0]] == [5], 'choose another seed'
    summary = generate(config(tmp_path/'set', **settings))
    assert not summary['complete'] and summary['failed_blocks'] == 1 and not summary['given_up']
    assert 'SIGSEGV' in summary['message'] and 'isolation: fork' in summary['message']
    with h5py.File(tmp_path/'set/dataset_0000.h5.partial') as file: assert np.flatnonzero(~file['done'][:]).tolist() == [5, 6, 7]


def test_a_hang_without_a_fork_ends_too(test_plugin, drafted, tmp_path):
    settings = dict(num_samples=8, plugin_path=str(test_plugin), param_set=param_set(drafted, tmp_path, misbehave=dict(Hang=1.)), isolation='state', timeout_seconds=.2)
    began = time.monotonic()
    summary = generate(config(tmp_path/'set', **settings))
    assert not summary['complete'] and 'SIGALRM' in summary['message'] and time.monotonic() - began < 30


@pytest.mark.parametrize('leakage', ['None', 'Instance'])
def test_restoring_the_state_is_enough_for_some_plugins(test_plugin, drafted, tmp_path, leakage):
    "Samples are the same in any order; where nothing leaks, they are those of the forks"
    settings = dict(num_samples=10, samples_per_file=3, plugin_path=str(test_plugin), param_set=param_set(drafted, tmp_path, leakage={leakage: 1.}))
    for name, isolation, engine in (('one', 'state', Shuffled(1)), ('other', 'state', Shuffled(2)), ('fork', 'fork', InlineEngine())):
        assert make(tmp_path/name, engine=engine, isolation=isolation, **settings)['complete']
    assert samples(tmp_path/'one') == samples(tmp_path/'other')
    if leakage == 'None': assert samples(tmp_path/'one') == samples(tmp_path/'fork')


# --- a directory that is not what it should be


TWENTY = dict(num_samples=20, samples_per_file=9)


def begun(reference, folder, done=1):
    "A copy of the reference of which only the first chunks are there"
    shutil.copytree(reference, folder)
    for path in sorted(folder.glob('*.h5'))[done:]: path.unlink()
    return folder


def test_damaged_partial(reference, tmp_path):
    "A sample with wrong bytes is rendered again; a file that is none is named, and the rest of the set is made"
    folder = begun(reference, tmp_path/'set')
    make(tmp_path/'stopped', max_attempts=1, min_loudness=-23., **TWENTY)  # leaves partial chunks
    partials = sorted((tmp_path/'stopped').glob('*.partial'))
    assert partials
    content = bytearray(partials[0].read_bytes())
    with h5py.File(partials[0]) as file: rows, place = np.flatnonzero(file['done'][:]), file['audio'].id.get_offset()
    content[place + int(rows[0]) * 2 * 2 * 8000 + 5000] ^= 1
    partials[0].write_bytes(content)
    done = done_count(tmp_path/'stopped')
    again = make(tmp_path/'stopped', resume=True, min_loudness=-23., **TWENTY)
    assert again['complete'] and again['rendered_now'] == 20 - done + 1
    make(tmp_path/'whole', min_loudness=-23., **TWENTY)
    assert chunks(tmp_path/'stopped') == chunks(tmp_path/'whole')
    for content in (b'', b'x' * 5000, (reference/'dataset_0000.h5').read_bytes()[:3000]):
        (folder/'dataset_0001.h5').unlink(missing_ok=True)
        (folder/'dataset_0002.h5').unlink(missing_ok=True)
        (folder/'dataset_0001.h5.partial').write_bytes(content)
        summary = make(folder, resume=True, **TWENTY)
        assert not summary['complete'] and 'dataset_0001.h5.partial' in summary['message'] and 'emove' in summary['message'], summary['message']
        assert (folder/'dataset_0002.h5').exists()
    (folder/'dataset_0001.h5.partial').unlink()
    make(folder, resume=True, **TWENTY)
    assert chunks(folder) == chunks(reference)


def test_somebody_elses_files(tmp_path):
    for name, content in {'my results.h5': b'precious', 'dataset_0000.h5': b'precious'}.items():
        folder = tmp_path/name.split('.')[0]
        folder.mkdir()
        (folder/name).write_bytes(content)
        for resume in (False, True):
            with pytest.raises(UsageError, match=f'It holds {name}, but no manifest.json'): make(folder, resume=resume, **TWENTY)
        assert (folder/name).read_bytes() == content
    other = tmp_path/'other'
    other.mkdir()
    for content, reason in {'{"a": 1}': "field 'format' is missing", 'x': 'not a valid JSON file', '[]': 'must hold a JSON object'}.items():
        (other/'manifest.json').write_text(content)
        with pytest.raises(FormatError, match=f'manifest.json: {reason}'): make(other, resume=True, **TWENTY)
    (tmp_path/'file').write_text('precious')
    with pytest.raises((DatatoolsError, OSError), match='file'): make(tmp_path/'file', **TWENTY)
    assert (tmp_path/'file').read_text() == 'precious'


@pytest.mark.parametrize('change, said', [(dict(seed=1), 'seed: 0 on disk, 1 asked for'), (dict(samples_per_file=10), 'samples_per_file: 9 on disk, 10 asked for'),
                                          (dict(min_loudness=-40), 'min_loudness: -55.0 on disk, -40.0 asked for'), (dict(compression='gzip'), 'compression')], ids=str)
def test_resumed_with_another_configuration(reference, tmp_path, change, said):
    folder = begun(reference, tmp_path/'set')
    before = chunks(folder)
    with pytest.raises(MismatchError, match=said): make(folder, resume=True, **{**TWENTY, **change})
    with pytest.raises(UsageError, match='It has a data set: go on with it by --resume'): make(folder, **TWENTY)
    assert chunks(folder) == before


def test_what_does_not_matter_may_change(reference, tmp_path):
    folder = begun(reference, tmp_path/'set')
    assert make(folder, resume=True, num_workers=3, max_attempts=7, timeout_seconds=30, **TWENTY)['rendered_now'] == 11
    moved = shutil.copytree(folder, tmp_path/'elsewhere')
    assert make(moved, resume=True, **TWENTY)['rendered_now'] == 0 and chunks(moved) == chunks(reference)


def test_resumed_with_another_plugin_or_parameter_set(test_plugin, drafted, tmp_path):
    "What differs is listed, not everything; the same plugin in another place is the same"
    newer, moved = (shutil.copytree(test_plugin, tmp_path/place/test_plugin.name) for place in ('newer', 'moved'))
    with open(next(newer.rglob('*.so')), 'ab') as library: library.write(b'a new version')
    settings = dict(num_samples=4, plugin_path=str(test_plugin), param_set=param_set(drafted, tmp_path))
    make(tmp_path/'set', max_attempts=1, **settings)
    param_set(drafted, tmp_path, leakage=dict(Instance=.5))
    with pytest.raises(MismatchError, match='parameters.leakage.weights: ') as error: make(tmp_path/'set', resume=True, **settings)
    assert str(error.value).count(' on disk, ') == 1
    param_set(drafted, tmp_path)
    with pytest.raises(MismatchError, match='instrument.sha256: .* on disk') as error: make(tmp_path/'set', resume=True, **{**settings, 'plugin_path': str(newer)})
    assert str(error.value).count(' on disk, ') == 1
    assert make(tmp_path/'set', resume=True, **{**settings, 'plugin_path': str(moved)})['complete']


@pytest.fixture
def small_disk(tmp_path):
    "A file system of its own: `small_disk('2m')`"
    mounted = []
    def mount(size, *options):
        folder = tmp_path/f'disk{len(mounted)}'
        folder.mkdir()
        if os.geteuid() or subprocess.run(['mount', '-t', 'tmpfs', '-o', ','.join([f'size={size}', *options]), 'tmpfs', folder], capture_output=True).returncode:
            pytest.skip('mounting a small file system needs root')
        mounted.append(folder)
        return folder
    yield mount
    for folder in mounted: subprocess.run(['umount', '-l', folder], check=True)


@pytest.mark.parametrize('kilobytes', [200, 1000, 1700])
def test_a_disk_that_fills_up(reference, small_disk, kilobytes):
    disk = small_disk(f'{kilobytes}k')
    with pytest.raises((DatatoolsError, OSError), match='No space left') as error: make(disk/'set', **TWENTY)
    assert str(error.value).count('\n') == 0
    safe = done_count(disk/'set')
    subprocess.run(['mount', '-o', 'remount,size=100m', disk], check=True)
    assert make(disk/'set', resume=True, **TWENTY)['rendered_now'] == 20 - safe
    assert chunks(disk/'set') == chunks(reference)


def test_output_that_cannot_be_written(small_disk, reference):
    with pytest.raises(OSError, match='Read-only'): make(small_disk('1m', 'ro')/'set', **TWENTY)
    disk = small_disk('50m')
    begun(reference, disk/'set')
    subprocess.run(['mount', '-o', 'remount,ro', disk], check=True)
    with pytest.raises(OSError, match='Read-only'): make(disk/'set', resume=True, **TWENTY)


# --- plugins of other kinds


def test_mono(plugin_variant, drafted, tmp_path):
    settings = dict(num_samples=4, plugin_path=str(plugin_variant('MONO')), param_set=param_set(drafted, tmp_path))
    summary = make(tmp_path/'stereo', **settings)
    assert not summary['complete'] and summary['failed_blocks'] == 1 and 'channels: 1' in summary['message']
    with pytest.raises(DatatoolsError, match='Nothing could be rendered: .*channels: 1'): make(tmp_path/'more', **{**settings, 'num_samples': 40})
    assert make(tmp_path/'mono', channels=1, **settings)['complete']
    with ChunkedDatasetReader(tmp_path/'mono') as reader: assert reader[0]['audio'].shape == (1, 8000) and reader[0]['mel_spec'].shape[:2] == (1, 128)


def test_one_of_a_bundle_of_two(plugin_variant, drafted, tmp_path, looked_at_once):
    path = plugin_variant('TWO_PLUGINS')
    settings = dict(num_samples=3, plugin_path=str(path), param_set=param_set(drafted, tmp_path))
    with pytest.raises(UsageError, match='It holds TestSynth-TWO_PLUGINS1, TestSynth-TWO_PLUGINS2: name one of them with plugin_name'): make(tmp_path/'set', **settings)
    with pytest.raises(UsageError, match="Did you mean 'TestSynth-TWO_PLUGINS2'"): make(tmp_path/'set', plugin_name='TestSynth-TWO_PLUGINS', **settings)
    assert make(tmp_path/'set', plugin_name='TestSynth-TWO_PLUGINS2', **settings)['complete']


def test_a_plugin_of_two_thousand_parameters(plugin_variant, drafted, tmp_path):
    path, began = plugin_variant('UNPATCHED'), time.monotonic()
    found = probe_instrument(path, details=True)
    assert len(found['names']) == 2124 and len(found['parameters']) == 44 and time.monotonic() - began < 20
    assert make(tmp_path/'set', num_samples=3, plugin_path=str(path), param_set=param_set(drafted, tmp_path))['complete']


def test_names_that_the_plugin_does_not_have(test_plugin, drafted, tmp_path):
    known = Path(param_set(drafted, tmp_path)).read_text()
    (tmp_path/'wrong.yaml').write_text(known.replace('filter_cutoff', 'filter_cutof').replace('delay_mix', 'delay_mixx'))
    with pytest.raises(UsageError) as error: make(tmp_path/'set', num_samples=3, plugin_path=str(test_plugin), param_set=str(tmp_path/'wrong.yaml'))
    for name in ("'filter_cutof'", "'filter_cutoff'", "'delay_mixx'", "'delay_mix'"): assert name in str(error.value)
    assert not (tmp_path/'set').exists()
    with pytest.raises(UsageError, match='parameter'): make(tmp_path/'set', num_samples=3, plugin_path=str(test_plugin), param_set='surge_simple')


# --- notes from MIDI files


def midi(path, *notes):
    "Write a file of (pitch, start, end) in seconds"
    messages = sorted([(start, 1, Message('note_on', note=pitch, velocity=90)) for pitch, start, _ in notes] + [(end, 0, Message('note_off', note=pitch)) for pitch, _, end in notes], key=lambda m: m[:2])
    track, before = MidiTrack(), 0.
    for moment, _, message in messages:
        track.append(message.copy(time=round((moment - before) * 960)))  # 480 ticks a beat, 120 beats a minute
        before = moment
    file = MidiFile()
    file.tracks.append(track)
    file.save(path)


def test_notes_of_midi_files(tmp_path):
    (tmp_path/'midi'/'deep').mkdir(parents=True)
    midi(tmp_path/'midi'/'a.mid', (60, 0., .25), (64, .25, 9.), (67, .75, 1.))  # one is longer than the sample, one begins after it
    midi(tmp_path/'midi'/'deep'/'b.MID', (40, .1, .3))
    (tmp_path/'midi'/'readme.txt').write_text('no notes')
    settings = dict(num_samples=12, samples_per_file=5, midi=str(tmp_path/'midi'))
    assert make(tmp_path/'set', **settings)['complete']
    with ChunkedDatasetReader(tmp_path/'set') as reader:
        assert {sample['midi_note'] for sample in reader} == {60, 40} and {sample['velocity'] for sample in reader} == {90}
        assert reader.layout.param_count == load_param_set('builtin').encoded_length - sum(parameter.size for parameter in load_param_set('builtin').note)
    make(tmp_path/'again', engine=Shuffled(3), **settings)
    assert chunks(tmp_path/'again') == chunks(tmp_path/'set')
    midi(tmp_path/'midi'/'deep'/'b.MID', (41, .1, .3))
    with pytest.raises(MismatchError, match='phrases'): make(tmp_path/'set', resume=True, **settings)


def test_midi_that_cannot_be_used(tmp_path):
    midi(tmp_path/'late.mid', (60, 5., 6.))
    (tmp_path/'broken.mid').write_bytes(b'MThd nonsense')
    (tmp_path/'empty').mkdir()
    for name, said in {'late.mid': 'no note begins within the first 0.5 seconds', 'broken.mid': 'not a readable MIDI file', 'empty': 'There is no .mid file in it', 'none.mid': 'There is no such file'}.items():
        with pytest.raises(DatatoolsError, match=f'{name}.*{said}'): make(tmp_path/'set', num_samples=3, midi=str(tmp_path/name))
    assert not list((tmp_path/'set').glob('[!.]*'))
