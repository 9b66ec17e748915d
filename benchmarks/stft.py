"""The dataset of precomputed STFTs beside its peers: same bytes, one run, in turns.

    python -m benchmarks.stft                     # everything: about ten minutes, 2 GB of temporary disk
    python -m benchmarks.stft --quick             # the same measures, small, in two minutes
    python -m benchmarks.stft --only loader       # one of: open batches loader cold write precompute kill

**open**: opening a store and asking for its length, from ten thousand to a million (tiny) items. **batches**: random
batches in one process, read into a buffer that is used again, against a memcpy of the same bytes: from the page cache,
through a memory map that has been touched, into a buffer of the same size and alignment that has been touched, item by
item in random order. That is the limit of any reader. **loader**: shuffled epochs from two workers through the ring, against memcpy into
as many buffers as the ring has slots, the stock `DataLoader` on the same dataset, and every peer at two workers. Each
peer writes the same items and gives batches of tensors; its workers have started and read an epoch before anything is
timed, and every item of that epoch is accounted for. What consumes the batches does not read them. **cold**: a
shuffled epoch, page cache dropped before, against the plain configuration (LMDB with its read-ahead off, no advice to
the kernel) and LMDB as it comes. The start of workers is counted. What the disk of a virtual machine keeps in the memory
of its host stays there. **write**: a complete store against a plain file with fsync,
in a process that has the memory for a transaction already, like a job that writes more than one. **precompute**: WAV files to
complete stores, on one core, as multiples of real time; with a worker process its start, about two seconds of imports, weighs the
more the shorter the job is. **kill**: the same job killed (SIGKILL) at random moments and
resumed: how many ended in the same bytes, and whether an item was lost that had been committed.

Items have an array of 1 MB or 64 KB and one number. Batches are 16 of the former, 64 of the latter. A peer that cannot
be imported is left out with a line that says so; `make bench` installs them (benchmarks/requirements.txt and requirements-alone.txt).
"""
import os

for _name in ('NUMBA_NUM_THREADS', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(_name, '1')
os.environ.setdefault('PYTHONWARNINGS', 'ignore:resource_tracker')  # Python's helper process tells of semaphores of the processes that **kill** has killed

import hashlib
import mmap
import multiprocessing
import random
import shutil
import signal
import statistics
import time
import warnings
from functools import partial
from typing import NamedTuple
from unittest import mock

import lmdb
import numpy as np
import psutil
import soundfile
import torch
from torch.utils.data import DataLoader

from benchmarks._harness import Row, Times, in_turns, run, say
from benchmarks._peers import PEERS, WORKERS, import_peer
from datatools.stft.dataset import PrecomputedSTFTDataset
from datatools.loader import make_loader
from datatools.stft.precompute import PrecomputeOptions, precompute
from datatools.stft.records import encode_record
from datatools.stft.store import StoreWriter, _freed_memory_kept, item_offsets, open_store
from datatools.stft.transform import STFTConfig


# ---------------------------------------------------------------- items

class Items:
    "Arrays of random float16 bits, the same for every format"
    def __init__(self, size, count):
        self.size, self.count, self.shape = size, count, (1, size // 256, 64, 2)
        self.pool = np.random.default_rng(0).integers(0, 1 << 15, 32 << 20, dtype=np.int16).view(np.float16)  # 64 MB

    def __len__(self): return self.count

    def __getitem__(self, k):
        if not 0 <= k < self.count: raise IndexError(k)
        begin = k * 4099 * 32 % (len(self.pool) - self.size // 2)
        return self.pool[begin:begin + self.size // 2].reshape(self.shape)

    def record(self, k): return encode_record(k, dict(stft=self[k], number=np.float32(k)), dict(source=f'{k:06d}.wav'))


class Kind(NamedTuple):
    "The two kinds of items"
    name: str
    size: int
    batch: int
    in_process: float  # targets, as shares of memcpy
    in_ring: float

    def items(self, megabytes): return Items(self.size, megabytes * 2**20 // self.size // self.batch * self.batch)
    def title(self, items): return f'{len(items):,} items of {self.name}, batches of {self.batch}'


KINDS = Kind('1 MB', 1 << 20, 16, 0.90, 0.55), Kind('64 KB', 1 << 16, 64, 0.70, 0.35)


def write_store(path, items, records=None):
    with StoreWriter(path, {}) as writer:
        for k in range(len(items)): writer.append(items.record(k) if records is None else records[k])
        writer.complete()
    return path


# ---------------------------------------------------------------- measuring

def seconds_of(contestants, rounds):
    "Like `in_turns`, for contestants that prepare something first and return the seconds that count"
    found = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, run in contestants.items(): found[name].append(run())
    return found


def per_second(seconds, amount): return [amount / each for each in seconds]
def shares(ours, other): return [b / a for a, b in zip(ours, other)]  # of seconds, round by round: the speed of ours over that of the other


def apart(function, *arguments, patience=600):
    "What a function returns in a spawned process of its own; an error there, or no end of it, is an error here"
    context = multiprocessing.get_context('spawn')
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(there, multiprocessing.get_start_method(), function, arguments))
    process.start()
    there.close()
    try:
        if not here.poll(patience): raise RuntimeError(f'no answer in {patience} s')
        value, error = here.recv()
    except EOFError: value, error = None, 'its process died'
    finally:
        process.join(5)
        if process.is_alive():
            for each in [*psutil.Process(process.pid).children(recursive=True), process]: each.kill()
    if error: raise RuntimeError(error)
    return value


def _answer(pipe, start_method, function, arguments):
    multiprocessing.set_start_method(start_method, force=True)  # for its own processes that of the system: spawn would be inherited
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')  # of peers about arrays that are not writeable
    try: answer = function(*arguments), None
    except Exception as error: answer = None, f'{type(error).__name__}: {error}'.splitlines()[0][:200]
    pipe.send(answer)


# ---------------------------------------------------------------- open

def opening(place, quick):
    "Open and length, by number of items"
    sizes = (10_000, 100_000) if quick else (10_000, 100_000, 1_000_000)
    for size in sizes:
        with StoreWriter(place / str(size), {}) as writer:
            for k in range(size): writer.append(encode_record(k, dict(number=np.float32(k)), {}))
            writer.complete()
    def look(size):
        dataset = PrecomputedSTFTDataset(place / str(size))
        if len(dataset) != size: raise SystemExit(f'open: {len(dataset)} items instead of {size}')
        dataset.close()
    for size in sizes: look(size)
    times = in_turns({size: partial(look, size) for size in sizes}, 50 if quick else 200)
    rows = []
    for size in sizes:
        found = Times(*([1000 * each for each in part] for part in times[size]))
        rows.append(Row('open + len', f'{size:,} items', found, 'ms', target='≤ 0.5', met=statistics.median(found.wall) <= 0.5))
    growth = rows[-1].median / rows[0].median
    return [*rows, Row('open + len', 'most items : fewest', [growth], target='flat: ≤ 1.2', met=growth <= 1.2)]


# ---------------------------------------------------------------- batches in one process

class Memcpy:
    "Copies items of a store out of the page cache, in random order, into buffers of a batch each"
    def __init__(self, path, items, batch, buffers=1):
        file = PrecomputedSTFTDataset(path)
        with open(file.path, 'rb') as opened: self.source = memoryview(mmap.mmap(opened.fileno(), 0, prot=mmap.PROT_READ))
        np.frombuffer(self.source, np.uint8)[::mmap.PAGESIZE].max()
        self.begins, self.size = item_offsets(file.path)[0] + file.info.schema.place('stft')[0], items.size
        self.target = memoryview(touched((items.size * batch * buffers,), 'u1'))  # aligned like the buffer of `_batches`: that matters
        self.chance = np.random.default_rng(1)
        file.close()

    def __call__(self):
        source, target, size, room = self.source, self.target, self.size, len(self.target)
        for k, begin in enumerate(self.chance.permutation(self.begins).tolist()):
            at = k * size % room
            target[at:at + size] = source[begin:begin + size]


def touched(shape, dtype):
    "An array at the beginning of a page, all of its pages there"
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    memory = np.ones(size + mmap.PAGESIZE, np.uint8)
    begin = -memory.ctypes.data % mmap.PAGESIZE
    return memory[begin:begin + size].view(dtype).reshape(shape)


def batches(place, quick):
    "Random batches into one buffer"
    rows = []
    for kind in KINDS:
        items = kind.items(100 if quick else 400)
        rows += apart(_batches, write_store(place / kind.name, items), items.count, kind, 5 if quick else 15)
        shutil.rmtree(place / kind.name)
    return rows


def _batches(path, count, kind, rounds):
    items, chance = Items(kind.size, count), np.random.default_rng(2)
    dataset = PrecomputedSTFTDataset(path)
    arrays = dict(stft=touched((kind.batch, *items.shape), 'f2'), number=touched((kind.batch,), 'f4'))
    def ours():
        for indices in chance.permutation(count).reshape(-1, kind.batch).tolist(): dataset.read_into(indices, arrays)
    contestants = dict(memcpy=Memcpy(path, items, kind.batch), ours=ours)
    for run in contestants.values(): run()
    indices = list(range(count - kind.batch, count))
    dataset.read_into(indices, arrays)
    if arrays['number'].tolist() != indices or arrays['stft'].tobytes() != b''.join(items[k].tobytes() for k in indices): raise SystemExit('batches: not what was written')
    times, amount = in_turns(contestants, rounds), count * kind.size / 1e9
    share = shares(times['ours'].wall, times['memcpy'].wall)
    measure = f'batches in one process, {kind.title(items)}, into one buffer of {kind.size * kind.batch >> 20} MB'
    return [Row(measure, 'memcpy from the page cache', times['memcpy'].rates(amount), 'GB/s'), Row(measure, 'datatools', times['ours'].rates(amount), 'GB/s'),
        Row(measure, '  of memcpy', share, target=f'≥ {kind.in_process:.2f}', met=statistics.median(share) >= kind.in_process)]


# ---------------------------------------------------------------- loader

def consume(loader):
    "One epoch"
    for batch in loader: batch['stft'].nbytes


def check_epoch(loader, items, who):
    "One epoch in which every item must come, with what belongs to it"
    seen = []
    for batch in loader:
        seen += (numbers := batch['number'].int().tolist())
        if batch['stft'][-1].numpy().tobytes() != items[numbers[-1]].tobytes(): raise RuntimeError(f'{who}: item {numbers[-1]} is not what was written')
    if {*seen} != {*range(len(items))}: raise RuntimeError(f'{who}: {len({*seen})} items of {len(items)}')


def loader(place, quick):
    "Two workers: the ring, the stock DataLoader, the peers"
    rows = []
    for kind in KINDS:
        items = kind.items(100 if quick else 400)
        path = write_store(place / kind.name, items)
        found = apart(_ring, path, items.count, kind, 5 if quick else 11)
        measure = found[0].measure
        rows += found
        for name in PEERS:
            try: seconds, paired = apart(_peer, name, place / 'peer', path, items.count, kind, 3 if quick else 5, patience=60 if quick else 180)
            except RuntimeError as error: left_out(name, error)
            else:
                amount = items.count * kind.size / 1e9
                times = statistics.median(shares(paired, seconds))
                rows.append(Row(measure, name, per_second(seconds, amount), 'GB/s', times=times, target='≥ 10x', met=times >= 10))
            shutil.rmtree(place / 'peer', ignore_errors=True)
        shutil.rmtree(path)
    return rows


LEFT_OUT = {}


def left_out(name, error):
    LEFT_OUT[name] = str(error)
    say(f'left out: {name}: {error}')


def _ring(path, count, kind, rounds):
    "The ring beside memcpy and the stock DataLoader"
    items, dataset = Items(kind.size, count), PrecomputedSTFTDataset(path)
    with make_loader(dataset, kind.batch, WORKERS, shuffle=True) as ring:
        check_epoch(ring, items, 'datatools')
        slots = ring._slots.ring.slots
        stock = DataLoader(dataset, kind.batch, shuffle=True, num_workers=WORKERS, persistent_workers=True)
        check_epoch(stock, items, 'stock DataLoader')
        contestants = dict(memcpy=Memcpy(path, items, kind.batch, slots), ours=partial(consume, ring), stock=(partial(consume, stock), -(-rounds // 2)))
        contestants['memcpy']()
        seconds = {name: times.wall for name, times in in_turns(contestants, rounds).items()}
    amount, share = count * kind.size / 1e9, shares(seconds['ours'], seconds['memcpy'])
    measure = f'loader, {WORKERS} workers, {kind.title(items)}; memcpy and ring over {slots} buffers, {kind.size * kind.batch * slots >> 20} MB'
    times = statistics.median(shares(seconds['ours'], seconds['stock']))
    return [Row(measure, 'memcpy from the page cache', per_second(seconds['memcpy'], amount), 'GB/s'), Row(measure, 'datatools, ring', per_second(seconds['ours'], amount), 'GB/s'),
        Row(measure, '  of memcpy', share, target=f'≥ {kind.in_ring:.2f}', met=statistics.median(share) >= kind.in_ring),
        Row(measure, 'datatools, stock DataLoader', per_second(seconds['stock'], amount), 'GB/s', times=times, target='≥ 8x', met=times >= 8)]


def _peer(name, folder, path, count, kind, rounds):
    "A peer beside the ring: seconds of both"
    import_peer(name)
    folder.mkdir(parents=True)
    items, peer = Items(kind.size, count), PEERS[name]
    peer.write(folder, items, kind.batch)
    theirs = peer.batches(folder, count, kind.batch)
    check_epoch(theirs, items, name)
    with make_loader(PrecomputedSTFTDataset(path), kind.batch, WORKERS, shuffle=True) as ring:
        consume(ring)
        times = in_turns(dict(ours=partial(consume, ring), theirs=partial(consume, theirs)), rounds)
    return times['theirs'].wall, times['ours'].wall


# ---------------------------------------------------------------- cold reads

class Unadvised(PrecomputedSTFTDataset):
    def advise(self, indices): pass


def drop_cache(path):
    "Have the kernel forget a file; the share of it that it keeps all the same"
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        there = 0
        for begin in np.linspace(0, os.fstat(descriptor).st_size - 1, 500).astype(int).tolist():
            try: there += os.preadv(descriptor, [bytearray(1)], begin, os.RWF_NOWAIT)
            except BlockingIOError: pass
        return there / 500
    finally: os.close(descriptor)


def cold(place, quick):
    "Shuffled epochs with nothing in memory"
    if not hasattr(os, 'posix_fadvise'): return say('cold: this system cannot drop a file from its cache') or []
    rows = []
    for kind in KINDS:
        items = kind.items(64 if quick else 400)
        path = write_store(place / kind.name, items)
        for workers in (0, WORKERS): rows += apart(_cold, path, items.count, kind, workers, 2 if quick else 3)
        shutil.rmtree(path)
    return rows


def _cold(path, count, kind, workers, rounds):
    items, kept, opened = Items(kind.size, count), [], lmdb.open
    def epoch(dataset_class, **options):
        kept.append(drop_cache(path / 'data.mdb'))
        advice = mmap.MADV_NORMAL if options.get('readahead') else mmap.MADV_RANDOM  # of the map that batches are read from
        with mock.patch.object(lmdb, 'open', lambda *a, **k: opened(*a, **{**k, **options})), mock.patch.object(mmap, 'MADV_RANDOM', advice):
            begin = time.perf_counter()
            with dataset_class(path) as dataset, make_loader(dataset, kind.batch, workers, shuffle=True, seed=len(kept)) as loader:
                consume(loader)
                return time.perf_counter() - begin
    def in_order():
        kept.append(drop_cache(path / 'data.mdb'))
        with open(path / 'data.mdb', 'rb', buffering=0) as file:
            begin = time.perf_counter()
            while file.readinto(block): pass
            return time.perf_counter() - begin
    block = touched((8 << 20,), 'u1')
    contestants = {'plain: read-ahead off, no advice': partial(epoch, Unadvised, readahead=False), 'LMDB as it comes: read-ahead on, no advice': partial(epoch, Unadvised, readahead=True),
        'datatools': partial(epoch, PrecomputedSTFTDataset), 'the file read through in order, without loader': in_order}
    seconds, amount = seconds_of(contestants, rounds), count * kind.size / 1e6
    measure = f'cold random reads, {workers} workers, {kind.title(items)}'
    if max(kept) > 0.02: say(f'cold: up to {max(kept):.0%} of the file stayed in memory')
    rows = [Row(measure, name, per_second(each, amount), 'MB/s') for name, each in seconds.items()]
    share, most = (shares(seconds[name], next(iter(seconds.values()))) for name in [*contestants][2:])
    rows.append(Row(measure, '  in order, times the plain configuration: the most that the disk allows', most, 'x'))
    return [*rows, Row(measure, '  times the plain configuration', share, 'x', target='≥ 10x', met=statistics.median(share) >= 10, note=f'{max(kept):.1%} of the file stayed in memory' if max(kept) else '')]


# ---------------------------------------------------------------- writing

def writing(place, quick):
    rows = []
    for kind in KINDS: rows += apart(_writing, place, kind, 64 if quick else 256, 3 if quick else 5)
    return rows


def _writing(place, kind, megabytes, rounds):
    "Stores against a plain file"
    items = kind.items(megabytes)
    records = [items.record(k) for k in range(len(items))]
    arrays = [items[k] for k in range(len(items))]
    def plain(path):
        path.mkdir()
        with open(path / 'plain', 'wb', buffering=0) as file:
            for array in arrays: file.write(memoryview(array).cast('B'))
            os.fsync(file.fileno())
    def timed(write):
        shutil.rmtree(place / 'new', ignore_errors=True)
        os.sync()  # what others have written is not counted
        begin = time.perf_counter()
        write(place / 'new')
        return time.perf_counter() - begin
    contestants = {'plain file + fsync': plain, 'datatools, records made before': lambda path: write_store(path, items, records),
        'datatools, records with their checksums made, too': lambda path: write_store(path, items)}
    with _freed_memory_kept():  # as between the transactions of a longer job
        for write in contestants.values(): timed(write)
        seconds = seconds_of({name: partial(timed, write) for name, write in contestants.items()}, rounds)
    measure, amount, rows = f'write, {len(items):,} items of {kind.name}', len(items) * kind.size / 1e6, []
    for name, each in seconds.items():
        rows.append(Row(measure, name, per_second(each, amount), 'MB/s'))
        if not name.endswith('made before'): continue  # a plain file has no checksums
        share = shares(each, seconds['plain file + fsync'])
        rows.append(Row(measure, '  of the plain file', share, target='≥ 0.8', met=statistics.median(share) >= 0.8))
    return rows


# ---------------------------------------------------------------- precompute

WHERE = {0: 'in the process itself', 1: 'in a worker process, start and imports included'}


def write_audio(folder, files, seconds, extension='wav'):
    "Decaying tones over a little noise, mono, 44.1 kHz, 16 bit"
    folder.mkdir()
    time_, chance = np.arange(round(seconds * 44_100)) / 44_100, np.random.default_rng(0)
    for k in range(files):
        tones = sum(np.sin(2 * np.pi * frequency * time_) * np.exp(-(time_ * each % 1) * 3) for frequency, each in zip(chance.uniform(60, 4000, 4), (1, 2, 3, 5)))
        soundfile.write(folder / f'{k:04d}.{extension}', (0.2 * tones + 0.01 * chance.standard_normal(len(time_))).astype(np.float32), 44_100, subtype='PCM_16')
    return folder


def precomputing(place, quick):
    "Audio to complete stores on one core"
    files, seconds, rows = 20 if quick else 60, 30, []
    audio = files * seconds
    write_audio(place / 'wav', files, seconds)
    measure = f'precompute on one core, {files} WAV files of {seconds} s, mono, 44.1 kHz, window 2048, hop 512'
    times = apart(_precomputing, place / 'wav', place / 'stores', 2 if quick else 3)
    for workers, each in times.items():
        speed = each.rates(audio)
        aim = {} if workers else dict(target='≥ 1000', met=statistics.median(speed.wall) >= 1000)
        rows.append(Row(measure, WHERE[workers], speed, 'x real time', **aim))
    return rows


def _precomputing(audio, output, rounds):
    if hasattr(os, 'sched_setaffinity'): os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    def run(workers):
        shutil.rmtree(output, ignore_errors=True)
        report = precompute([audio], output, options=PrecomputeOptions(workers=workers, show_progress=False))
        if report['train']['refused'] or report['val']['refused']: raise RuntimeError('a file was refused')
    run(0)
    return in_turns({workers: partial(run, workers) for workers in (0, 1)}, rounds)


# ---------------------------------------------------------------- kills

SIDES = 'train', 'val'


def digest(output): return hashlib.sha256(b''.join((output / f'{side}.lmdb' / 'data.mdb').read_bytes() for side in SIDES)).hexdigest()


def committed(output):
    "Items that each of the two stores says it has"
    return [open_store(output / f'{side}.lmdb').count if (output / f'{side}.lmdb' / 'data.mdb').exists() else 0 for side in SIDES]


def precompute_process(audio, output, workers):
    "One attempt, with a transaction for every 2 MB, so that there are many"
    with mock.patch('datatools.stft.precompute.StoreWriter', partial(StoreWriter, commit_bytes=2 << 20)):
        precompute([audio], output, STFTConfig(segment_seconds=1.0), 0.3, resume=True, options=PrecomputeOptions(workers=workers, show_progress=False))


def attempt(audio, output, workers, patience=None):
    "Whether it came to its end before it was killed"
    process = multiprocessing.get_context('fork').Process(target=precompute_process, args=(audio, output, workers))
    process.start()
    process.join(patience)
    if process.is_alive(): os.kill(process.pid, signal.SIGKILL)
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL): raise SystemExit(f'precompute failed with exit code {process.exitcode}')
    return process.exitcode == 0


def kills(place, quick):
    "Killed anywhere, resumed: same bytes"
    audio = write_audio(place / 'wav', 24, 7.3)
    return [_killed(place, audio, workers, times) for workers, times in ((0, 4 if quick else 24), (1, 2 if quick else 6))]


def _killed(place, audio, workers, times):
    "One to four kills a run"
    chance, same, kills, lost = random.Random(1), 0, 0, 0
    begin = time.perf_counter()
    attempt(audio, place / 'whole', workers)
    whole, seconds = digest(place / 'whole'), time.perf_counter() - begin
    for _ in range(times):
        output, before = place / 'killed', [0, 0]
        for _ in range(chance.randint(1, 4)):
            if attempt(audio, output, workers, chance.uniform(0, seconds)): break
            kills += 1
            now = committed(output)
            lost += any(a > b for a, b in zip(before, now))
            before = now
        attempt(audio, output, workers)
        same += digest(output) == whole
        shutil.rmtree(output)
    shutil.rmtree(place / 'whole')
    measure = 'precompute killed (SIGKILL) at random moments, then resumed: same sha256 as the uninterrupted run'
    return Row(measure, WHERE[workers], [same], f'of {times}', target=f'{times}, none lost', met=same == times and not lost,
        note=f'{kills} kills in runs of {seconds:.1f} s, {lost} with an item lost that had been committed')


# ---------------------------------------------------------------- command line

MEASURES = dict(open=opening, batches=batches, loader=loader, cold=cold, write=writing, precompute=precomputing, kill=kills)


if __name__ == '__main__': run('stft', __doc__, MEASURES, lambda: LEFT_OUT)
