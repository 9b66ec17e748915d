"""Jobs on a Dask cluster: a real scheduler and real workers on this machine, which are killed, stopped and started again."""
import hashlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import cloudpickle
import numpy as np
import psutil
import pytest
import soundfile
import yaml
from distributed import Client, LocalCluster
from test_pool_legacy import game, write

from datatools import cluster as cluster_module
from datatools.cluster import DaskEngine
from datatools.core import DatatoolsError, LockedError, file_lock, read_json, rng_for, write_json
from datatools.groove.events import GrooveConfig
from datatools.groove.files import FileList
from datatools.groove.train import Run, train_model
from datatools.jobs import run_tasks
from datatools.pool.hex import HexCodec
from datatools.pool.legacy import convert
from datatools.pool.play import GameSource, make_shards
from datatools.stft.precompute import PrecomputeOptions, precompute
from datatools.stft.transform import STFTConfig
from datatools.testing import sleep_for, square, write_drum_corpus
from datatools.vst.config import make_config
from datatools.vst.generate import generate

ROOT = Path(__file__).resolve().parent.parent


class Aside(threading.Thread):
    "A call in a thread of its own; what it raises comes out where it is waited for"
    def __init__(self, function, *arguments):
        super().__init__(daemon=True)
        self.call, self.error = partial(function, *arguments), None
        self.start()

    def run(self):
        try: self.value = self.call()
        except BaseException as error: self.error = error

    def end(self, seconds: float = 100):
        self.join(seconds)
        assert not self.is_alive(), 'waited in vain'
        if self.error: raise self.error
        return self.value


def wait_until(condition, seconds: float = 60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'waited in vain'
        time.sleep(.02)


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(('127.0.0.1', 0))
        return listening.getsockname()[1]


class Cluster:
    "A scheduler and its workers, each a process group of its own, started in a folder that is not that of the job."
    def __init__(self, folder: Path, workers: int):
        self.folder, self.port, self.processes = folder, free_port(), []
        self.address = f'tcp://127.0.0.1:{self.port}'
        self.start(workers)

    def start(self, workers: int):
        self.run('scheduler', '--host', '127.0.0.1', '--port', self.port, '--no-dashboard')
        for _ in range(workers): self.worker()

    def worker(self, *options, threads: int = 1, path: Path = ROOT):
        return self.run('worker', self.address, '--nthreads', threads, '--no-dashboard', '--death-timeout', 30, '--local-directory', self.folder, *options, path=path)

    def run(self, *arguments, path: Path = ROOT):
        environment = dict(os.environ, PYTHONPATH=os.pathsep.join([str(path), str(ROOT)]))
        with open(self.folder/'log', 'ab') as log:
            self.processes.append(subprocess.Popen([sys.executable, '-m', 'dask', *map(str, arguments)], cwd=self.folder, env=environment, stdout=log, stderr=log, start_new_session=True))
        return self.processes[-1]

    def stop(self, *processes):
        "Kill these, or all"
        for process in processes or [*self.processes]:
            try: os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError: pass  # it has left by itself
            process.wait()
            self.processes.remove(process)


@pytest.fixture(scope='module')
def cluster(tmp_path_factory):
    made = Cluster(tmp_path_factory.mktemp('cluster'), 2)
    yield made
    made.stop()


@pytest.fixture(scope='module')
def client(cluster):
    with Client(cluster.address, timeout=30, set_as_default=False) as connected:
        connected.wait_for_workers(2, timeout=60)
        yield connected


def workers_of(client) -> list: return [*client.run(os.getpid).values()]
def known(client) -> int: return client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks))
def beside(worker: int) -> set: return {child.pid for child in psutil.Process(worker).children()}


SLOW_DISK = """
import os, time
def late(name):
    call = getattr(os, name)
    def slow(*arguments, **options):
        time.sleep(.2)
        with open({log!r}, 'a') as log: log.write(f'{{time.time()}} {{name}} {{arguments[-1]}}\\n')
        return call(*arguments, **options)
    setattr(os, name, slow)
for name in ('fsync', 'rename', 'replace'): late(name)
"""


@pytest.fixture
def slow(cluster, client, tmp_path_factory):
    "A third worker, whose disk is slow and which has the resource `slow`: the file in which each of its writes is noted, and the process number of the worker"
    folder = tmp_path_factory.mktemp('slow')
    (folder/'sitecustomize.py').write_text(SLOW_DISK.format(log=str(folder/'log')))
    started = cluster.worker('--name', folder.name, '--resources', 'slow=1', path=folder)
    def number(): return {fact['name']: client.run(os.getpid, workers=[address])[address] for address, fact in client.scheduler_info(-1)['workers'].items()}.get(folder.name)
    wait_until(number, 60)
    yield folder/'log', number()
    cluster.stop(started)
    wait_until(lambda: len(client.ncores()) == 2)


# The four tools, with something small to do each.

@pytest.fixture(scope='module')
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp('inputs')
    loops = write_drum_corpus(folder/'loops', 40)
    loops[3].write_bytes(b'MThd' * 300)
    (folder/'audio').mkdir()
    for number in range(8): soundfile.write(folder/f'audio/{number}.wav', np.random.default_rng(number).normal(0, .1, 8000 + 1000 * number), 8000)
    (folder/'audio/7.wav').write_bytes(b'RIFF' * 30)
    (folder/'old').mkdir()
    for number in range(4): write(folder/f'old/shuffled_{number:04}.pkl.gz', [position for each in range(3) for position in game(rng_for(number, each), 10 * number + each)])
    return folder


def groove(inputs, folder, engine, resume=False):
    train_model(FileList.from_directory(inputs/'loops'), folder/'drums.model', GrooveConfig(order=4), Run(resume=resume, show_progress=False, log_every=0), engine, shards=None if engine == 'local' else 5)


def stft(inputs, folder, engine, resume=False):
    precompute(inputs/'audio', folder/'sound', STFTConfig(8000, 256, 128), .3, resume=resume, options=PrecomputeOptions(show_progress=False), engine=engine)


def vst(inputs, folder, engine, resume=False, samples=10):
    settings = dict(output_dir=str(folder/'set'), num_samples=samples, samples_per_file=4, sample_rate=16_000, duration_seconds=.5)
    assert generate(make_config(settings, 'here'), resume, False, engine)['complete']


def legacy(inputs, folder, engine, resume=False): convert(inputs/'old', folder/'shards', rows_per_shard=50, engine=engine)
def games(inputs, folder, engine, resume=False, count=40): make_shards(folder/'played', [GameSource('mixed', count)], HexCodec(5), 5, show_progress=False, engine=engine)


TOOLS = dict(groove=groove, stft=stft, vst=vst, legacy=legacy, games=games)
UNLIKE = 'throughput.jsonl', 'make_shards.ledger', 'lock.mdb'  # seconds, and the numbers of processes


def content(folder: Path) -> dict:
    "Checksums of all that was made; locks aside."
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob('*'))
            if path.is_file() and not path.name.endswith('.lock') and path.name not in UNLIKE}


@pytest.fixture(scope='module')
def alone(inputs, tmp_path_factory):
    "What a tool makes on one machine: `alone('vst')`"
    made = {}
    def make(tool, **more):
        if (key := (tool, str(more))) not in made:
            folder = tmp_path_factory.mktemp(tool)
            TOOLS[tool](inputs, folder, 'local', **more)
            made[key] = content(folder)
        return made[key]
    return make


@pytest.mark.parametrize('tool', TOOLS)
def test_the_same_bytes_as_on_one_machine(tool, inputs, client, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # relative paths must arrive as what they mean here
    for place, engine in (('alone', 'local'), ('cluster', client)):
        Path(place).mkdir()
        TOOLS[tool](Path(os.path.relpath(inputs)), Path(place), engine)
    made, expected = content(tmp_path/'cluster'), content(tmp_path/'alone')
    assert made.keys() == expected.keys() and len(made) > 1
    assert [name for name in made if made[name] != expected[name]] == []
    wait_until(lambda: known(client) == 0)


@pytest.mark.parametrize('tool', TOOLS)
def test_two_programs_cannot_write_one_output(tool, inputs, cluster, client, tmp_path):
    stopped = workers_of(client)
    for worker in stopped: os.kill(worker, signal.SIGSTOP)
    try:
        first = Aside(TOOLS[tool], inputs, tmp_path, cluster.address)
        wait_until(lambda: known(client) > 0)
        with pytest.raises(LockedError, match='is held by'): TOOLS[tool](inputs, tmp_path, client, resume=True)
    finally:
        for worker in stopped: os.kill(worker, signal.SIGCONT)
    first.end()
    assert content(tmp_path)


# Accidents

def test_a_worker_killed_in_the_middle(inputs, client, alone, tmp_path):
    job = Aside(vst, inputs, tmp_path, client)
    wait_until(lambda: (tmp_path/'set/throughput.jsonl').exists() or [*tmp_path.glob('set/*.partial')])
    os.kill(workers_of(client)[0], signal.SIGKILL)
    job.end()
    assert content(tmp_path) == alone('vst')
    client.wait_for_workers(2, timeout=60)  # its nanny starts another one


def test_a_worker_that_stands_still(inputs, client, alone, tmp_path):
    "As one does whose disk does not answer: the others go on, and when it answers nothing is lost."
    slow = workers_of(client)[0]
    os.kill(slow, signal.SIGSTOP)
    try:
        job = Aside(games, inputs, tmp_path, client)
        wait_until(lambda: len([*tmp_path.glob('played/mixed/*.records')]) > 1)
        assert job.is_alive()
    finally: os.kill(slow, signal.SIGCONT)
    job.end()
    assert content(tmp_path) == alone('games')


def test_a_worker_with_a_slow_disk(inputs, client, alone, slow, tmp_path):
    "It does what it can, the others go on meanwhile, and the bytes are the same."
    log, _ = slow
    games(inputs, tmp_path, client)
    assert content(tmp_path) == alone('games')
    log.write_text('')
    results = run_tasks(write_json, [(str(number), (tmp_path/f'{number}.json', number)) for number in range(300)], engine=client)
    assert [result.error for result in results] == [None] * 300
    assert [read_json(tmp_path/f'{number}.json') for number in range(300)] == [*range(300)]
    assert 0 < sum(' replace ' in line for line in log.read_text().splitlines()) < 12  # with those before the first slow one only it would be 300 / 12


def test_few_tasks_are_with_the_scheduler(client):
    "Of a million tasks only those go there that there is room for, and when the job is left none stays."
    results, most = run_tasks(square, ((str(number), (number,)) for number in range(1_000_000)), engine=client), 0
    for number in range(100):
        assert next(results).value == number ** 2
        if number % 5 == 0: most = max(most, known(client))
    results.close()
    assert 0 < most <= 4 * 2
    wait_until(lambda: known(client) == 0)
    assert len(client.run_on_scheduler(lambda dask_scheduler: [name for name in dask_scheduler.task_prefixes if 'square' in name])) == 1


def test_an_interrupted_job_gives_the_workers_back(client):
    def processes(): return {child.pid for worker in workers_of(client) for child in psutil.Process(worker).children()}
    results = run_tasks(sleep_for, [('short', (0,)), ('long', (300,)), ('longer', (300,))], engine=client)
    next(results)
    wait_until(lambda: any(client.processing().values()))
    time.sleep(.5)
    busy = processes()
    results.close()
    wait_until(lambda: not busy <= processes())
    assert [result.value for result in run_tasks(square, [(str(number), (number,)) for number in range(8)], engine=client)] == [number ** 2 for number in range(8)]


def test_resources_that_no_worker_has(request, client, caplog, monkeypatch):
    "It is said what is missing; when it comes, only the workers that have it do the work."
    monkeypatch.setattr(cluster_module, 'PATIENCE', .1)
    engine = DaskEngine(client=client, resources={'slow': 1})
    job = Aside(lambda: [*run_tasks(os.getppid, [(str(number), ()) for number in range(4)], engine=engine)])
    wait_until(lambda: "no workers with {'slow': 1}" in caplog.text and 'dask worker' in caplog.text and '--resources "slow=1"' in caplog.text)
    assert job.is_alive() and engine.workers == 1
    _, worker = request.getfixturevalue('slow')
    assert [result.value for result in job.end()] == [worker] * 4


def test_resources_on_the_command_line(cluster, slow, tmp_path):
    "One of three workers has them, the one whose writes are noted."
    job = command('pool', 'make-shards', '--games', 10, '--board-size', 5, '-o', tmp_path/'played', '--scheduler', cluster.address, '--resources', 'slow=1', folder=tmp_path)
    _, said = job.communicate(timeout=100)
    assert job.returncode == 0, said
    shards = [path for path in tmp_path.rglob('*.records')]
    assert shards and all(path.name in slow[0].read_text() for path in shards)


@pytest.fixture
def by_value():
    "Functions of this file travel whole: workers cannot import it."
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def long_beside(worker: int, mark: Path):
    "A task that takes a minute beside one worker and no time beside others"
    if os.getppid() == worker:
        mark.touch()
        time.sleep(60)


def test_a_worker_is_retired_in_the_middle_of_a_task(client, slow, by_value, tmp_path):
    "Another one does its task, and what it has started ends with it, at once."
    _, worker = slow
    address, = [address for address, number in client.run(os.getpid).items() if number == worker]
    with ThreadPoolExecutor(1) as job:
        done = job.submit(list, run_tasks(long_beside, [(str(number), (worker, tmp_path/'begun')) for number in range(12)], engine=client))
        wait_until((tmp_path/'begun').exists)
        processes = beside(worker)
        client.retire_workers([address], close_workers=True)
        wait_until(lambda: not any(psutil.pid_exists(process) for process in (worker, *processes)))
        assert processes and [(result.error, result.attempts) for result in done.result(60)] == [(None, 1)] * 12


def test_a_shard_waits_for_an_attempt_that_was_given_up(inputs, tmp_path):
    "The scheduler has another worker begin before the first one has heard that it shall end."
    config, options = STFTConfig(8000, 256, 128), PrecomputeOptions(workers=0, show_progress=False)
    (tmp_path/'made/.shard-0000').mkdir(parents=True)
    with ThreadPoolExecutor(1) as second:
        with file_lock(tmp_path/'made/.shard-0000/.lock'):
            made = second.submit(precompute, inputs/'audio/1.wav', tmp_path/'made', config, 0, options=options, shards=1)
            time.sleep(.5)
            assert not made.done()
        assert made.result(60)['train']['files'] == 1


def test_a_cluster_that_scales_by_itself():
    "Workers come when there are tasks, leave while tasks run, and are gone when there are none."
    with LocalCluster(n_workers=0, threads_per_worker=1, dashboard_address=':0', silence_logs=logging.CRITICAL) as cluster, Client(cluster, set_as_default=False) as client:
        cluster.adapt(minimum=0, maximum=2, interval='100ms', target_duration='200ms')
        engine, seen, pids = DaskEngine(client=client), [], set()
        def tasks():
            "More and more, until one worker had to leave"
            for number in range(300):
                if pids and seen[-1] == 1: return
                yield str(number), (.2 + number / 1000,)
        for number, result in enumerate(run_tasks(sleep_for, tasks(), engine=engine)):
            assert result.value == .2 + number / 1000 and result.attempts == 1
            seen.append(engine.workers)
            if max(seen) == 2 and not pids:
                pids = set(workers_of(client))
                cluster.adapt(minimum=0, maximum=1, interval='100ms', wait_count=1)  # one has to leave, whatever it is at
        assert seen[-1] == 1 < max(seen) == 2 == len(pids)
        wait_until(lambda: not client.ncores() and not any(psutil.pid_exists(number) for number in pids))


def kill_parent(number: int, guilty=()):
    "Kill the worker beside which this process runs"
    time.sleep(.4 if number in guilty else .02)  # a nanny that has only just started its worker might give up
    if number in guilty: os.kill(os.getppid(), signal.SIGKILL)
    return number


def test_a_task_that_kills_its_worker(client, by_value):
    "Each time, whatever worker the nanny starts: it has crashed, and those that waited behind it, though they may be blamed at first, are done."
    def allow(failures): client.run_on_scheduler(lambda dask_scheduler: setattr(dask_scheduler, 'allowed_failures', failures))
    allow(1)
    try: results = [*run_tasks(partial(kill_parent, guilty=[3]), [(str(number), (number,)) for number in range(24)], engine=client)]
    finally: allow(3)
    assert [result.value for result in results] == [None if number == 3 else number for number in range(24)]
    assert (results[3].error.kind, results[3].attempts) == ('crash', 2)
    assert '2 workers with nothing else to do were lost while they tried it' in results[3].error.message


def command(*arguments, folder, **options):
    return subprocess.Popen([sys.executable, '-c', 'from datatools.cli import main; main()', *map(str, arguments)], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            env=dict(os.environ, PYTHONPATH=str(ROOT)), **options)


def test_a_scheduler_that_is_killed(inputs, tmp_path, caplog, monkeypatch):
    (tmp_path/'cluster').mkdir()
    (tmp_path/'out').mkdir()
    cluster = Cluster(tmp_path/'cluster', 0)
    try:
        settings = dict(output_dir='out/set', num_samples=60, samples_per_file=4, sample_rate=16_000, duration_seconds=.5)
        (tmp_path/'vst.yaml').write_text(yaml.safe_dump(settings))
        job = command('vst', 'generate', '--config', 'vst.yaml', '--scheduler', cluster.address, folder=tmp_path)
        monkeypatch.setattr(cluster_module, 'PATIENCE', .5)  # a cluster without workers is waited for
        squares = Aside(lambda: [*run_tasks(square, [('a', (1,)), ('b', (2,))], engine=cluster.address)])
        wait_until(lambda: 'has no workers' in caplog.text)
        assert job.poll() is None and squares.is_alive()
        cluster.run('worker', cluster.address, '--nthreads', 1, '--no-dashboard', '--no-nanny', '--local-directory', cluster.folder)
        assert [result.value for result in squares.end()] == [1, 4]
        wait_until(lambda: len([*tmp_path.glob('out/set/*.h5')]) > 1)
        os.killpg(cluster.processes[0].pid, signal.SIGKILL)
        begun = time.monotonic()
        _, said = job.communicate(timeout=60)
        assert time.monotonic() - begun < 30
        errors = [line for line in said.splitlines() if line.startswith('Error: ')]
        assert job.returncode == 1 and len(errors) == 1 and 'is gone' in errors[0] and 'resume' in errors[0], said
        assert 'Traceback' not in said, said
        finished = content(tmp_path/'out')
        cluster.stop()
        cluster.start(1)
        job = command('vst', 'generate', '--config', 'vst.yaml', '--scheduler', cluster.address, '--resume', '--json', folder=tmp_path)
        output, said = job.communicate(timeout=100)
        assert job.returncode == 0, said
        assert 0 < json.loads(output)['rendered_now'] < 60
    finally: cluster.stop()
    made = content(tmp_path/'out')
    vst(inputs, tmp_path/'alone', 'local', samples=60)
    assert made == content(tmp_path/'alone')
    assert all(made[name] == finished[name] for name in finished if name.endswith('.h5'))


@pytest.mark.parametrize('function, timeout, kind', [(os._exit, None, 'crash'), (sleep_for, .2, 'timeout')])
def test_workers_end_by_themselves_after_a_crash(function, timeout, kind, capfd):
    "Though the process beside one was started anew: none waits for it until its nanny kills it."
    failed, = run_tasks(function, [('a', (3,))], retries=1, engine=DaskEngine(2, timeout))
    assert (failed.error.kind, failed.attempts) == (kind, 2)
    said = capfd.readouterr().err
    assert 'still alive' not in said and 'Traceback' not in said, said


def test_the_environment_of_tasks_and_of_the_program(client, monkeypatch):
    "A task does not give every freed array back to the system, as Dask has its workers do; a cluster that is started here does not limit the threads of whatever this program starts later."
    assert {*client.run(os.getenv, 'MALLOC_TRIM_THRESHOLD_', nanny=True).values()} != {None}  # by Dask, on the way to its workers
    monkeypatch.delenv('MALLOC_TRIM_THRESHOLD_', raising=False)
    before = {*os.environ}
    for engine in client, DaskEngine(1):
        result, = run_tasks(os.getenv, [('a', ('MALLOC_TRIM_THRESHOLD_',))], engine=engine)
        assert (result.value, result.error) == (None, None)
    assert not {'MALLOC_TRIM_THRESHOLD_', 'OMP_NUM_THREADS', 'MKL_NUM_THREADS'} & ({*os.environ} - before)


# The command line, and what is not there

def test_a_cluster_of_this_machine(tmp_path):
    job = command('pool', 'make-shards', '--games', 10, '--board-size', 5, '-o', 'played', '--engine', 'dask', '--workers', 2, '--progress', folder=tmp_path, start_new_session=True)
    _, said = job.communicate(timeout=100)
    assert job.returncode == 0 and said.count('Dashboard of the cluster: http://') == 1, said
    make_shards(tmp_path/'alone/played', [GameSource(name, 10, *rest) for name, *rest in (('random', 0.), ('mixed', .5), ('strong', .95, 4))], HexCodec(5), show_progress=False)
    assert content(tmp_path/'played') == content(tmp_path/'alone/played')
    left = [process for process in psutil.process_iter(['pid', 'status']) if process.info['status'] != psutil.STATUS_ZOMBIE and _group(process.pid) == job.pid]
    assert not left


def _group(number):
    try: return os.getpgid(number)
    except ProcessLookupError: return None


SCRIPT = """
import sys
from datatools.jobs import run_tasks
def double(number): return 2 * number
if __name__ == '__main__': print([result.value for result in run_tasks(double, [(str(number), (number,)) for number in range(5)], engine=sys.argv[1])])
"""


def test_functions_of_a_script(cluster, client, tmp_path, python):
    (tmp_path/'script.py').write_text(SCRIPT)
    done = python(tmp_path/'script.py', cluster.address)
    assert done.stdout == '[0, 2, 4, 6, 8]\n', done.stderr


def test_a_result_that_cannot_be_sent(client):
    result, = run_tasks(threading.Lock, [('lock', ())], engine=client)
    assert result.error.kind == 'exception' and 'cannot be pickled' in result.error.message


def test_another_version(client, monkeypatch):
    monkeypatch.setattr(cluster_module, '__version__', '0.0.0')
    with pytest.raises(DatatoolsError, match='install the same on all machines'): [*run_tasks(square, [('a', (1,)), ('b', (2,))], engine=client)]


def test_without_dask(tmp_path, python):
    code = "import sys; sys.modules['distributed'] = None; from datatools.cli import main; main()"
    for arguments in (['pool', 'make-shards', '--games', 10, '-o', tmp_path/'a', '--engine', 'dask'], ['groove', 'train', ROOT/'tests', '-o', tmp_path/'b', '--scheduler', 'tcp://127.0.0.1:1']):
        done = python('-c', code, *arguments)
        assert done.returncode == 2 and "pip install 'datatools[cluster]'" in done.stderr and 'Traceback' not in done.stderr, done.stderr
