"""What a cluster costs and what it brings: a local Dask cluster on loopback beside our own worker processes.

    python -m benchmarks.cluster                  # everything
    python -m benchmarks.cluster --quick          # the same measures, small
    python -m benchmarks.cluster --only overhead  # one of: tasks cost overhead scaling

**tasks**: how long a task is that each tool makes by default, for processes of this machine and for a cluster; a sound of
4 s, songs of 30 s, and drum loops of `datatools.testing`. **cost**: what a task of no length takes, by the wall clock and
in processor time of the process that has the scheduler and the bookkeeping in it, which is what limits a large cluster.
**overhead**: tasks that sleep as long as those of the tools, one worker: the share of the time that nobody worked.
Tasks longer than two seconds sleep for two, and the share is reckoned for their length. **scaling**: the tasks that each
tool makes, those of a cluster cut to about two seconds, by two workers and by one, in turns, everything started and
imported before; beside it the same for plain Python processes, which no scheduler slows: two hyperthreads of one core are
not two cores, and that is the ceiling.
"""
import os

for _name in ('NUMBA_NUM_THREADS', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(_name, '1')

import gzip
import multiprocessing
import pickle
import shutil
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property, partial

import numpy as np
import soundfile

from benchmarks._harness import Row, in_turns, run, say
from datatools.cluster import DaskEngine
from datatools.core import rng_for
from datatools.groove.events import GrooveConfig
from datatools.groove.files import BATCH_FILES, count_files_apart
from datatools.groove.shards import SHARD_FILES
from datatools.jobs import LocalEngine, Task, run_tasks
from datatools.pool.legacy import convert_file
from datatools.pool.pickles import LIMIT_BYTES, winner
from datatools.stft.precompute import CLUSTER_BYTES, TASK_BYTES, _spectra_bytes, transform_file, transform_files
from datatools.stft.transform import STFTConfig
from datatools.testing import sleep_for, write_drum_corpus
from datatools.vst.config import GenerateConfig
from datatools.vst.generate import BLOCK, plan, render_block

LONGEST = 2.  # seconds that a task sleeps


class Groove:
    "Counting MIDI files"
    name, function = 'groove', staticmethod(count_files_apart)
    local, cluster = f'{BATCH_FILES} files', f'{SHARD_FILES:,} files'
    times = SHARD_FILES / BATCH_FILES  # a task of the cluster, in tasks of this machine

    def __init__(self, place): self.files = [(str(path), False) for path in write_drum_corpus(place/'corpus', BATCH_FILES)]
    def tasks(self, count, times=1): return [Task(str(number), (self.files * times, GrooveConfig(), None, False, 1 << 20)) for number in range(count)]


class Spectra:
    "Transforming songs, as many in a task as `precompute` puts there"
    name, function = 'stft', staticmethod(partial(transform_files, partial(transform_file, config=STFTConfig())))
    songs = int(TASK_BYTES // _spectra_bytes('song.wav', 30 * 44_100 * 2, STFTConfig()))
    times = CLUSTER_BYTES / TASK_BYTES
    local, cluster = f'{songs} songs of 30 s', f'{int(songs * times)} songs of 30 s'

    def __init__(self, place):
        self.place = place
        soundfile.write(place/'song.wav', rng_for(0).standard_normal(30 * 44_100) / 10, 44_100, subtype='PCM_16')

    def tasks(self, count, times=1): return [Task(str(number), ([(str(self.place/'song.wav'), str(self.place/f'spool-{number}'), 'song.wav', {})] * self.songs * times,)) for number in range(count)]


class Sounds:
    "Rendering patches of the synth that is built in"
    name, function = 'vst', staticmethod(render_block)
    local, cluster = f'{BLOCK} samples', f'{GenerateConfig.samples_per_file:,} samples'
    times = GenerateConfig.samples_per_file / BLOCK

    def __init__(self, place): self.place = place/'sounds'

    @cached_property
    def job(self):
        config = GenerateConfig(str(self.place), BLOCK * 1000, plugin_path='builtin', param_set='builtin')
        return replace(plan(config)[0], config=replace(config, samples_per_file=BLOCK))

    def tasks(self, count, times=1):
        shutil.rmtree(self.place, ignore_errors=True)
        self.place.mkdir()
        job = replace(self.job, config=replace(self.job.config, samples_per_file=times * BLOCK))
        return [Task(str(number), (job, number, 0, times * BLOCK)) for number in range(count)]


class Positions:
    "Converting pickled examples"
    name, function = 'pool', staticmethod(convert_file)
    local = cluster = 'a file of 200 games'
    times = 1

    def __init__(self, place):
        self.place, rng = place, rng_for(0)
        examples = [example for number in range(200) for example in self.game(rng, number)]
        (place/'shuffled_0000.pkl.gz').write_bytes(gzip.compress(pickle.dumps({'examples': examples}, 4), 1))

    @staticmethod
    def game(rng, number, size=11):
        "All positions of a random game"
        board, examples = np.zeros((2, size, size), np.float32), []
        for ply, cell in enumerate(rng.permutation(size * size)):
            if winner(board) >= 0: break
            policy = np.zeros(size * size, np.float32)
            policy[cell] = 1
            examples.append(dict(board=board.copy(), policy=policy, player_to_move=ply % 2))
            board[ply % 2].reshape(-1)[cell] = 1
        examples.append(dict(board=board, policy=None, player_to_move=len(examples) % 2))
        for position, example in enumerate(examples):
            example |= dict(value=int(winner(board)), metadata=dict(game_id=number, position_in_game=position, total_positions=len(examples)))
        return examples

    def tasks(self, count, times=1): return [Task(str(number), (self.place/'shuffled_0000.pkl.gz', self.place/f'part-{number}.records', False, 'global', 0, LIMIT_BYTES)) for number in range(count)]


TOOLS = Groove, Spectra, Sounds, Positions
class Kept(LocalEngine):
    "Worker processes that stay from one job to the next"
    @contextmanager
    def lasting(self):
        super().start()
        try: yield self
        finally: super().stop()

    def start(self): pass
    def stop(self): pass


ENGINES = {'processes': Kept, 'Dask': DaskEngine}


def work(engine, function, tasks):
    "Seconds of each task; an error if one fails"
    seconds = []
    for result in run_tasks(function, tasks, engine=engine):
        if result.error: raise result.error
        seconds.append(result.seconds)
    return seconds


@contextmanager
def started(kind, workers):
    "An engine whose workers have begun"
    with kind(workers).lasting() as engine:
        work(engine, sleep_for, [Task(f'first {number}', (.2,)) for number in range(2 * workers)])
        yield engine


def lengths(place, quick):
    "Seconds of a task of each tool, on one worker"
    with started(Kept, 1) as engine:
        found = {}
        for tool in TOOLS:
            made = tool(place)
            work(engine, tool.function, made.tasks(2))  # imports, compiled code, page cache
            found[tool] = work(engine, tool.function, made.tasks(3 if quick else 9))
    return found


def tasks(place, quick):
    rows = []
    for tool, seconds in lengths(place, quick).items():
        rows.append(Row('a task, processes of this machine', f'{tool.name}: {tool.local}', [1000 * each for each in seconds], 'ms'))
        rows.append(Row('a task, cluster', f'{tool.name}: {tool.cluster}', [1000 * tool.times * each for each in seconds], 'ms',
            note='' if tool.times == 1 else f'{tool.times:.4g} times the one above'))
    return rows


def cost(place, quick):
    count, rows = (100, []) if quick else (1000, [])
    for name, kind in ENGINES.items():
        with started(kind, 2) as engine:
            wall, processor = [], []
            for _ in range(2 if quick else 5):
                began = time.perf_counter(), time.process_time()
                work(engine, sleep_for, [Task(str(number), (0,)) for number in range(count)])
                wall.append(1000 * (time.perf_counter() - began[0]) / count)
                processor.append(1000 * (time.process_time() - began[1]) / count)
        rows += [Row('a task of no length, 2 workers', f'{name}: wall clock', wall, 'ms'),
                 Row('a task of no length, 2 workers', f'{name}: processor time of scheduler and bookkeeping', processor, 'ms')]
    return rows


def overhead(place, quick):
    found, rows = lengths(place, quick), []
    for name, kind in ENGINES.items():
        with started(kind, 1) as engine:
            for tool, measured in found.items():
                length = statistics.median(measured) * (tool.times if kind is DaskEngine else 1)
                slept, shares = min(length, LONGEST), []
                for _ in range(1 if quick else 5):
                    count, began = max(2, int((1 if quick else 8) / slept)), time.perf_counter()
                    work(engine, sleep_for, [Task(str(number), (slept,)) for number in range(count)])
                    extra = (time.perf_counter() - began) / count - slept
                    shares.append(100 * extra / (length + extra))
                rows.append(Row(f'time that is not work, one worker, {name}', f'{tool.name}: {tool.cluster if kind is DaskEngine else tool.local}', shares, '%',
                    target='≤ 5 %', met=statistics.median(shares) <= 5, note=f'tasks of {length:.3g} s'))
    return rows


def _plain(pool, function, tasks): [each.result() for each in [pool.submit(function, *task.arguments) for task in tasks]]


def scaling(place, quick):
    rows, spawn = [], multiprocessing.get_context('spawn')
    for tool, measured in lengths(place, quick).items():
        made, length = tool(place), statistics.median(measured)
        say(f'scaling: {tool.name}')
        for name in ('plain processes', *ENGINES):
            times = max(1, min(int(tool.times), round(LONGEST / length))) if name == 'Dask' else 1
            count = 2 * max(2 if quick else 4, round((1 if quick else 4) / (times * length)))
            with ExitStack() as stack:
                runs = {}
                for workers in (1, 2):
                    if name == 'plain processes': run = partial(_plain, stack.enter_context(ProcessPoolExecutor(workers, mp_context=spawn)))
                    else: run = partial(work, stack.enter_context(started(ENGINES[name], workers)))
                    run(tool.function, made.tasks(2 * workers))
                    runs[workers] = lambda run=run: run(tool.function, made.tasks(count, times))
                seconds = in_turns(runs, 1 if quick else 5)
            ratios = [one / two for one, two in zip(seconds[1].wall, seconds[2].wall)]
            aimed = {} if name == 'plain processes' else dict(target='≥ 1.8x', met=statistics.median(ratios) >= 1.8)
            rows.append(Row(f'two workers against one, {tool.name}', name, ratios, 'x',
                note=f'{count} tasks of {times * length:.2g} s' + ('' if aimed else ', the ceiling'), **aimed))
    return rows


MEASURES = dict(tasks=tasks, cost=cost, overhead=overhead, scaling=scaling)


if __name__ == '__main__': run('cluster', __doc__, MEASURES)
