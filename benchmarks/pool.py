"""The mixed pool beside its peers: the same records, shuffled, in batches of 1,024.

    python -m benchmarks.pool                     # everything: about nine minutes, 5 GB of temporary disk
    python -m benchmarks.pool --quick             # the same measures, small
    python -m benchmarks.pool --only stream       # one of: stream memory latency mixing resume

**stream**: rows per second of one process, packed and as float32 tensors board, policy and value, ours with its symmetries.
Every peer has a process of its own, several rounds in turns, an epoch or a few seconds each, in files in the page cache. The
tensors of the peers are made in two ways: whole batches at once with vectorised NumPy, as fast as we could make them, and,
where a peer gives items, item by item as their examples do it. **memory**: the largest resident size of a process with a pool
of 40 million positions, how long it takes to permute (and to read) its rows, and the time to the first batch of a pool of
two million. **latency**: what the slowest batch in a thousand costs beside the median, over many rounds.
**mixing**: the mix report of an epoch of shards in the order of their games, with a pool of a twentieth of the data: rounds,
the pool as it was before, and a full shuffle. **resume**: streams stopped at random batches and resumed with other ranks and
workers: how many went on with the very rows.
"""
import os

for _name in ('NUMBA_NUM_THREADS', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(_name, '1')

import itertools
import multiprocessing
import statistics
import time
import warnings
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch

from benchmarks._harness import Row, run, say
from benchmarks._pool_peers import CELLS, PEERS, RECORD, consume, import_peer
from datatools.core import peak_rss_bytes
from datatools.pool.codecs import RecordCodec
from datatools.pool.dataset import StreamingMixedShardDataset
from datatools.pool.hex import HexCodec
from datatools.pool.report import collect_stream, mix_report
from datatools.pool.shards import finish_directory, write_shard

BATCH, SECONDS = 1024, 3.  # rows of a batch; longest round of a contestant
TARGETS = dict(dense={'mmap gather': 3}, items={'list-of-dicts pool': 500, 'LitData': 25, 'torchdata nodes': 25, 'MosaicML streaming': 150})
KINDS = dict(raw='packed', dense='float32 tensors, whole batches decoded at once', items='float32 tensors, the peers decode item by item')


# ---------------------------------------------------------------- records

def positions(count, codec, seed=0):
    "Records that keep the rules: stones in turn on random cells, the next one is the policy"
    chance, records = np.random.default_rng(seed), np.zeros(count, codec.dtype)
    for begin in range(0, count, 50_000):
        part = records[begin:begin + 50_000]
        ply = chance.integers(0, CELLS - 1, len(part))
        order = chance.random((len(part), CELLS), np.float32).argsort(1).argsort(1)
        for colour, name in enumerate(('blue', 'red')): part[name] = np.packbits((order < ply[:, None]) & (order % 2 == colour), axis=1, bitorder='little')
        part['policy'], part['ply'], part['flags'] = (order == ply[:, None]).argmax(1), ply, ply % 2 + 2 * chance.integers(0, 2, len(part))
    return records


def write_directories(folder, shares, rows_per_shard):
    "Directories with `shares[d]` shards each; the shards of a directory hold the same rows, which no reader knows"
    codec, found = HexCodec(13), []
    for number, shards in enumerate(shares):
        path, records = folder / f'd{number}', positions(rows_per_shard, codec, number)
        path.mkdir(parents=True)
        for shard in range(shards): write_shard(path / f'shard_{shard:04d}.records', records, np.arange(rows_per_shard) // 60 + (shard << 32), codec)
        found.append(path)
    for path in found: finish_directory(path, codec)
    return found


def all_rows(directories): return np.concatenate([shard.records() for shard in StreamingMixedShardDataset(directories, random_seed=0).shards])


# ---------------------------------------------------------------- stream

class Ours:
    "What a peer is, for the pool"
    def __init__(self, directories, batch, pool):
        self.dataset, self.epoch = StreamingMixedShardDataset(directories, pool_size=pool, batch_size=batch, random_seed=0), 0

    def _next(self):
        self.epoch += 1
        self.dataset.set_epoch(self.epoch)

    def raw(self):
        self._next()
        return self.dataset.raw_batches()

    def dense(self):
        self._next()
        return iter(self.dataset)

    items = dense


def timed(batches):
    "Rows per second of wall clock and of processor time, of an epoch or the first seconds of one"
    next(batches)
    rows, wall, processor = 0, time.perf_counter(), time.process_time()
    for batch in batches:
        rows += consume([batch])
        if time.perf_counter() - wall > SECONDS: break
    return rows / (time.perf_counter() - wall), rows / (time.process_time() - processor)


def contestant(name, directories, folder, pool):
    "In a process of its own: make the reader and keep it for the rounds to come"
    global reader
    warnings.simplefilter('ignore')  # of peers about arrays that are not writeable
    torch.set_num_threads(1)
    if name == 'datatools': reader = Ours(directories, BATCH, pool)
    else:
        import_peer(name)
        folder.mkdir()
        records = all_rows(directories).view(np.uint8).reshape(-1, 48).view(RECORD).reshape(-1)
        PEERS[name].write(folder, records[:getattr(PEERS[name], 'most', None)])
        reader = PEERS[name](folder, BATCH)
    for kind in KINDS: list(itertools.islice(_batches(kind), 3))


def _batches(kind): return iter(getattr(reader, kind, tuple)())


def takes_part(kind): return hasattr(reader, kind)


def round_of(kind): return timed(_batches(kind))


def stream(place, quick):
    "Rows per second, beside the peers"
    shard, rounds = (25_000, 2) if quick else (200_000, 3)
    directories = write_directories(place / 'ours', (3, 2), shard)
    total, pools, found = 5 * shard, {}, {kind: {} for kind in KINDS}
    for name in ('datatools', *PEERS):
        process = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'))
        try: process.submit(contestant, name, directories, place / name.replace(' ', '-'), total // 4).result()
        except ImportError as error: say(f'{name} is left out: {error}')
        else: pools[name] = process
    for kind, _, (name, process) in itertools.product(found, range(rounds), pools.items()):
        if process.submit(takes_part, kind).result(): found[kind].setdefault(name, []).append(process.submit(round_of, kind).result())
    for process in pools.values(): process.shutdown()
    return [row for kind in found for row in _stream_rows(kind, found[kind], total)]


def _stream_rows(kind, found, total):
    measure = f'{KINDS[kind]}, {total:,} records of 48 bytes, batches of {BATCH:,}, one process'
    least, ours = dict(raw=10e6, dense=5e6, items=5e6)[kind], statistics.median(processor for _, processor in found['datatools'])
    for name, rates in found.items():
        wall, processor = zip(*rates)
        row = Row(measure, name, list(processor), 'rows/CPU s')
        if name == 'datatools': row.target, row.met = f'≥ {least / 1e6:g} M', ours >= least
        else:
            row.times = ours / row.median
            target = TARGETS.get(kind, {}).get(name)
            if target: row.target, row.met = f'≥ {target}x', row.times >= target
        yield row


# ---------------------------------------------------------------- memory and latency

def big_directory(place, rows, rows_per_shard):
    "One directory with as many rows"
    codec, path = HexCodec(13), place / f'big{rows}'
    path.mkdir(parents=True)
    records = np.tile(positions(50_000, codec), -(-rows_per_shard // 50_000))[:rows_per_shard]
    for shard in range(rows // rows_per_shard):
        records['source'] = shard % 256
        write_shard(path / f'shard_{shard:04d}.records', records, codec=codec)
    return finish_directory(path, codec).path


def filling(directory, pool):
    "In a process of its own: seconds to permute the rows of a pool, to do so and read them, until the first batch; and memory"
    torch.set_num_threads(1)
    small = StreamingMixedShardDataset([directory], pool_size=2048, batch_size=BATCH, random_seed=0, max_examples_unaugmented=4096)
    for batch in small: pass  # compiled functions are loaded
    for rows in small.provenance(): pass
    dataset = StreamingMixedShardDataset([directory], pool_size=pool, batch_size=BATCH, random_seed=0)
    begin = time.perf_counter()
    numbers = dataset.provenance()
    next(numbers)
    permuted = time.perf_counter() - begin
    del numbers
    begin = time.perf_counter()
    batches = iter(dataset)
    next(batches)
    first, filled = time.perf_counter() - begin, dataset.seconds_reading
    for batch in itertools.islice(batches, 3000): pass
    return permuted, filled, first, peak_rss_bytes()


def apart(function, *arguments):
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as process: return process.submit(function, *arguments).result()


def memory(place, quick):
    "A pool of forty million, and the time to the first batch of two million"
    rows = []
    for pool, targets in ((2_000_000, (.1, None, .5, None)), (4_000_000 if quick else 40_000_000, (3., None, None, 2.5))):
        directory = big_directory(place, 2 * pool, pool // 16)  # two whole rounds
        found = [apart(filling, directory, pool) for _ in range(3)]
        permuted, filled, first, peak = map(list, zip(*found))
        measure = f'pool of {pool:,} of {2 * pool:,} positions'
        for who, values, unit, target in zip(('permuting its rows', 'permuting and reading its rows', 'first batch', 'largest resident size of the process'),
                                             (permuted, filled, first, [each / 2**30 for each in peak]), ('s', 's', 's', 'GiB'), targets):
            row = Row(measure, who, values, unit)
            if target is not None: row.target, row.met = f'≤ {target:g}', row.median <= target
            rows.append(row)
        for path in directory.iterdir(): path.unlink()
    return rows


def batch_times(directory, pool, epochs):
    "In a process of its own: seconds of every batch, of epochs with many rounds"
    torch.set_num_threads(1)
    dataset = StreamingMixedShardDataset([directory], pool_size=pool, batch_size=BATCH, random_seed=0)
    for batch in itertools.islice(dataset, 50): pass
    found = []
    for epoch in range(epochs):
        dataset.set_epoch(epoch)
        batches = iter(dataset)
        next(batches)
        while True:
            begin = time.perf_counter()
            if next(batches, None) is None: break
            found.append(time.perf_counter() - begin)
    return found


def latency(place, quick):
    "The slowest batch in a thousand beside the median, across refills"
    total = 400_000 if quick else 4_000_000
    directory = big_directory(place, total, total // 16)
    rows = []
    for name, pool in (('20 rounds', total // 20), ('4 rounds', total // 4)):
        tails, middles = [], []
        for _ in range(3):
            seconds = np.array(apart(batch_times, directory, pool, 2 if quick else 4))
            middles.append(float(np.median(seconds)) * 1e6)
            tails.append(float(np.quantile(seconds, .999)) / float(np.median(seconds)))
        measure = f'batches of {BATCH:,}, {total:,} positions in {name}, dense'
        rows += [Row(measure, 'median', middles, 'us'), Row(measure, 'slowest in a thousand : median', tails, target='≤ 5', met=statistics.median(tails) <= 5)]
    return rows


# ---------------------------------------------------------------- mixing and resume

def mixing(place, quick):
    "How well an epoch is mixed with a pool of a twentieth of it, shards in the order of their games"
    shard = 20_000 if quick else 200_000
    directories = write_directories(place, (12, 6, 2), shard)
    rows, total = [], 20 * shard
    def report_of(**options):
        dataset = StreamingMixedShardDataset(directories, pool_size=total // 20, batch_size=BATCH, random_seed=1, **options)
        home = [number for number, source in enumerate(dataset.sources) for _ in source.shards]
        return mix_report(collect_stream(dataset.provenance(), home, [each.rows for each in dataset.shards], [each.games() for each in dataset.shards]), BATCH)
    rounds, before = report_of(), report_of(order='sequential')
    names = dict(chi2_1024='chi²/dof, windows of 1 k', chi2_65536='chi²/dof, windows of 64 k', twentieth='deviation of a shard in a twentieth', directory_prefix='directory off its quota, rows',
                 same_game_pairs='pairs of one game in a batch', missing='rows missing', repeated='rows repeated')
    targets = dict(chi2_1024=1.1, chi2_65536=1.1, twentieth=.012, directory_prefix=1, missing=0, repeated=0)
    for key, name in names.items():
        measure = f'mixing, {total:,} positions, pool of {total // 20:,}: {name}'
        ours = Row(measure, 'rounds', [rounds[key].value], target=f'≤ {targets[key]:g}' if key in targets else '', met=rounds[key].value <= targets[key] if key in targets else None)
        rows += [ours, Row(measure, 'sequential, as it was before', [before[key].value]), Row(measure, 'full shuffle', [rounds[key].limit if rounds[key].expected is None else rounds[key].expected])]
    return rows


def resume(place, quick):
    "Stopped anywhere, resumed with other ranks and workers: the same rows"
    kind = np.dtype([('id', '<u8')])
    place.mkdir(parents=True, exist_ok=True)
    directory, codec, each = place / 'ids', RecordCodec(kind), 5000 if quick else 30_000
    directory.mkdir()
    for shard in range(4): write_shard(directory / f'shard_{shard}.records', np.arange(shard * each, (shard + 1) * each, dtype='u8').view(kind), codec=codec)
    finish_directory(directory, codec)
    options, chance = dict(pool_size=each // 2, batch_size=BATCH, random_seed=3), np.random.default_rng(0)
    whole = np.concatenate([batch['id'] for batch in StreamingMixedShardDataset([directory], **options).raw_batches()])
    once = np.array_equal(np.sort(whole), np.arange(4 * each))
    good, tried = 0, 0
    for ranks, workers in itertools.product((1, 2, 3, 8), (0, 1, 2, 4)):
        tried += 1
        good += np.array_equal(_resumed(directory, options, ranks, workers, int(chance.integers(0, 4 * each // BATCH))), whole)
    measure = f'stopped at a random batch, resumed with ranks 1, 2, 3, 8 and workers 0, 1, 2, 4; {4 * each:,} rows'
    return [Row(measure, 'the very stream', [good], f'of {tried}', target=f'{tried}', met=good == tried), Row(measure, 'every row exactly once', [int(once)], target='1', met=once)]


def _resumed(directory, options, ranks, workers, stop):
    "The stream of one process up to a batch, then that of several"
    from datatools.pool.dataset import make_loader
    before = StreamingMixedShardDataset([directory], **options)
    head = [batch['id'].numpy() for batch in itertools.islice(iter(before), stop)]
    state, parts = before.state_dict(), []
    for rank in range(ranks):
        loader = make_loader(StreamingMixedShardDataset([directory], rank=rank, world_size=ranks, **options), workers)
        loader.load_state_dict(state)
        parts.append([batch['id'].numpy() for batch in loader])
    return np.concatenate([*head, *(batch for group in zip(*parts) for batch in group)]).astype(np.uint64)


SECTIONS = dict(stream=stream, memory=memory, latency=latency, mixing=mixing, resume=resume)


if __name__ == '__main__': run('pool', __doc__, SECTIONS)
