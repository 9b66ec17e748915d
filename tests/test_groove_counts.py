"""Counting is exact: every structure against `collections.Counter`, whatever the order of events, the memory, or the crash."""
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from datatools.arrays import ArrayFile, write_arrays
from datatools.core import FormatError, LockedError, MemoryLimitError, UsageError
from datatools.groove.counts import KeyLayout, Tally, fold_blocks, fold_order, merge_blocks, merge_runs, ngram_keys, sort_order
from datatools.groove.stores import MemmapStore, MemoryStore, SqliteStore, read_order_shards, write_order_shards

ROOT = Path(__file__).resolve().parent.parent
LAYOUTS = [KeyLayout((8, 8, 8)), KeyLayout((30, 20, 14)), KeyLayout((20, 20, 20, 20)), KeyLayout((32, 32, 32, 32))]  # one word, all of it, two words
layouts = st.sampled_from(LAYOUTS)
LARGE = [1, 2, 3, 255, 2**31, 2**32 - 2, 2**32 - 1, 2**32, 2**32 + 1, 2**40]


def rows_of(layout, most=40):
    "Lists of field values: few different ones, so that keys repeat, and the extremes"
    field = [st.sampled_from([0, 1, 2, (1 << width) - 1]) for width in layout.bits]
    return st.lists(st.tuples(*field), max_size=most)


def pack(layout, rows): return layout.pack(np.array(rows, np.int64).reshape(-1, len(layout.bits)).T)


def run_of(layout, counter):
    "A sorted run (keys, counts) of a Counter of rows"
    keys, counts = pack(layout, list(counter)), np.array(list(counter.values()), np.uint64)
    order = sort_order(keys)
    return keys[order], counts[order]


def counter_of(layout, *runs, fields=None):
    "A Counter of rows; checks on the way that keys ascend, are distinct, and that counts have the narrowest dtype"
    total, last = Counter(), None
    for keys, counts in runs:
        assert keys.dtype == np.uint64 and len(keys) == len(counts) and (counts > 0).all()
        for key, row, count in zip(map(tuple, keys.tolist()), map(tuple, layout.unpack(keys, fields).tolist()), counts.tolist()):
            assert last is None or key > last, 'keys must ascend'
            total[row], last = count, key
    return total


@settings(deadline=None)
@given(st.data(), layouts)
def test_keys_hold_their_fields_and_sort_like_them(data, layout):
    rows = data.draw(rows_of(layout))
    keys = pack(layout, rows)
    assert list(map(tuple, layout.unpack(keys).tolist())) == rows
    assert [rows[i] for i in sort_order(keys)] == sorted(rows)
    for field, width in enumerate(layout.bits):
        wrong = [0] * len(layout.bits)
        for wrong[field] in (-1, 1 << width):
            with pytest.raises(UsageError): pack(layout, [wrong])


@settings(deadline=None)
@given(st.data(), st.integers(1, 6), st.booleans())
def test_ngrams_of_files(data, order, with_position):
    vocabulary = 200
    files = data.draw(st.lists(st.lists(st.tuples(st.integers(0, vocabulary - 1), st.integers(0, 255)), max_size=8), max_size=4))
    token, position = ([pair[i] for file in files for pair in file] for i in (0, 1))
    starts = np.cumsum([0] + [len(file) for file in files])
    layout = KeyLayout((8, 8) + (8,) * (order - 1)) if with_position else KeyLayout((8,) * order)
    keys = ngram_keys(np.array(token, np.uint16), starts, vocabulary, layout, np.array(position, np.uint8) if with_position else None)
    expected = []
    for file in files:
        for i, (now, _) in enumerate(file):
            history = [file[i - j][0] if i - j >= 0 else vocabulary for j in range(1, order)]
            expected.append((now, *([file[i - 1][1] if i else 0] if with_position else []), *history))
    assert list(map(tuple, layout.unpack(keys).tolist())) == expected


operations = st.lists(st.sampled_from(['add', 'add', 'add_run', 'drain', 'take']), max_size=12)


@settings(max_examples=50, deadline=None)
@given(st.data(), layouts, st.integers(4, 70), operations)
def test_tally_counts_like_a_counter(data, layout, buckets, steps):
    tally, expected, taken = Tally(layout.words, buckets), Counter(), []
    for step in steps:
        rows = data.draw(rows_of(layout, 100))
        if step == 'add':
            tally.add(pack(layout, rows))
            expected.update(rows)
        elif step == 'add_run':
            counter = Counter({row: data.draw(st.sampled_from(LARGE)) for row in rows[:5]})
            tally.add_run(*run_of(layout, counter))
            expected.update(counter)
        elif step == 'drain': tally.drain()
        else: taken.append(tally.take())
    taken.append(tally.take())
    parts = [counter_of(layout, run) for run in taken]
    assert sum(parts, Counter()) == expected
    assert all(counts.dtype == (np.uint64 if len(counts) and counts.max() >= 2**32 else np.uint32) for _, counts in taken)
    assert len(tally.take()[1]) == 0


@pytest.mark.parametrize('keys_made, buckets', [(5000, 4), (5000, 100), (20_000, 1 << 20)])
def test_tally_with_many_keys(keys_made, buckets):
    "Tables that fill up, grow and drain"
    rng = np.random.default_rng(0)
    keys = rng.zipf(1.3, (60_000, 2)).clip(1, keys_made).astype(np.uint64) << np.uint64(40)  # low bits equal: a bad hash would cluster
    tally = Tally(2, buckets)
    for part in np.array_split(keys, 7): tally.add(part)
    found_keys, counts = tally.take()
    wanted, times = np.unique(keys, axis=0, return_counts=True)
    assert np.array_equal(found_keys, wanted) and np.array_equal(counts, times)


def test_a_counter_is_emptied_before_it_overflows():
    "As if 2**32 - 3 hits of one key had been added"
    tally, key = Tally(1, 16), np.array([[7]], np.uint64)
    tally.add(key)
    tally._counters[tally._counters > 0] = 2**32 - 3
    tally._since_drain = 2**32 - 3
    tally.add(np.repeat(key, 10, axis=0))
    keys, counts = tally.take()
    assert keys.tolist() == [[7]] and counts.tolist() == [2**32 + 7] and counts.dtype == np.uint64


@settings(deadline=None)
@given(st.data(), layouts, st.integers(1, 5), st.integers(1, 9))
def test_runs_and_blocks_merge_like_counters(data, layout, number, block_rows):
    counters = [Counter({row: data.draw(st.sampled_from(LARGE)) for row in data.draw(rows_of(layout))}) for _ in range(number)]
    runs = [run_of(layout, counter) for counter in counters]
    expected = sum(counters, Counter())
    assert counter_of(layout, merge_runs(runs)) == expected
    readers = [lambda start, stop, run=run: (run[0][start:stop], run[1][start:stop]) for run in runs]
    blocks = list(merge_blocks(readers, block_rows))
    assert counter_of(layout, *blocks) == expected
    narrow = [(keys, counts if counts.max(initial=0) >= 2**32 else counts.astype(np.uint32)) for keys, counts in runs]
    assert counter_of(layout, merge_runs(narrow)) == expected


@settings(deadline=None)
@given(st.data(), layouts, st.lists(st.integers(0, 40), max_size=5))
def test_shorter_orders_are_sums_over_the_longest(data, layout, cuts):
    counter = Counter({row: data.draw(st.sampled_from(LARGE)) for row in data.draw(rows_of(layout))})
    keys, counts = run_of(layout, counter)
    cuts = [0, *sorted(min(cut, len(counts)) for cut in cuts), len(counts)]
    blocks = [(keys[a:b], counts[a:b]) for a, b in zip(cuts, cuts[1:])]
    for fields in range(1, len(layout.bits) + 1):
        expected = Counter()
        for row, count in counter.items(): expected[row[:fields]] += count
        assert counter_of(layout, fold_order(keys, counts, layout, fields), fields=fields) == expected
        assert counter_of(layout, *fold_blocks(blocks, layout, fields), fields=fields) == expected
        assert counter_of(layout, *fold_blocks([block for block in blocks if len(block[1])], layout, fields), fields=fields) == expected


@settings(max_examples=40, deadline=None)
@given(st.data(), layouts, st.lists(st.integers(0, 40), max_size=5), st.integers(1, 12))
def test_order_shards(tmp_path_factory, data, layout, cuts, max_rows):
    directory = tmp_path_factory.mktemp('shards')
    counter = Counter({row: data.draw(st.sampled_from(LARGE)) for row in data.draw(rows_of(layout))})
    keys, counts = run_of(layout, counter)
    cuts = [0, *sorted(min(cut, len(counts)) for cut in cuts), len(counts)]
    for _ in range(2):  # what an earlier run left is replaced
        facts = write_order_shards(directory, 3, ((keys[a:b], counts[a:b]) for a, b in zip(cuts, cuts[1:])), max_rows)
    shards = [ArrayFile(path) for path in sorted((directory/'order_3').iterdir())]
    assert counter_of(layout, *((shard['keys'], shard['counts']) for shard in shards)) == counter
    assert facts == dict(rows=len(counter), shards=-(-len(counter) // max_rows), dtype='uint64' if max(counter.values(), default=0) >= 2**32 else 'uint32')
    assert all(len(shard['counts']) == max_rows for shard in shards[:-1])
    assert all(shard['counts'].dtype == (np.uint64 if shard['counts'].max() >= 2**32 else np.uint32) for shard in shards)


def test_shards_that_are_not_what_meta_says_are_refused(tmp_path):
    layout = LAYOUTS[0]
    with pytest.raises(FormatError, match='did not finish'): read_order_shards(tmp_path, 1)
    with closing(MemmapStore(tmp_path, lambda name: layout)) as store:
        store.add_run('ngram', *run_of(layout, Counter({(i % 7, i, 0): i + 1 for i in range(100)})))
        store.add_run('ngram', *run_of(layout, Counter({(6, 6, 0): 2**32})))
        meta = store.write_shards('ngram', 3, 10, dict(order=3))
    assert (meta['schema_version'], meta['order'], meta['dtype']) == (2, 3, 'uint64') and json.loads((tmp_path/'meta.json').read_text()) == meta
    for order, rows in ((1, 7), (2, 100), (3, 100)):
        found, shards = read_order_shards(tmp_path, order)
        assert found == meta and sum(len(shard['counts']) for shard in shards) == rows
        assert sum(int(shard['counts'].astype(np.uint64).sum()) for shard in shards) == 5050 + 2**32
    with pytest.raises(UsageError): read_order_shards(tmp_path, 4)
    shard = sorted((tmp_path/'order_3').iterdir())[3]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(FormatError, match='9 shards'): read_order_shards(tmp_path, 3)
    shard.write_bytes(content[:-1])
    with pytest.raises(FormatError, match='truncated|damaged'): read_order_shards(tmp_path, 3)
    (tmp_path/'meta.json').write_text(json.dumps({**meta, 'schema_version': 1}))
    with pytest.raises(FormatError, match='schema_version 1'): read_order_shards(tmp_path, 1)


# Stores: the same operations on each, with checkpoints and crashes in between

NAMES = ['ngram', 'ngram@funk/groove "1"', 'ngram@ÿ ✓ %2F', 'position']


def store_layouts(name): return LAYOUTS[2] if name == 'position' else LAYOUTS[0]


def opened(kind, directory, buckets, memory_bytes):
    if kind == 'memory': return MemoryStore(store_layouts, buckets)
    if kind == 'memmap': return MemmapStore(directory/'counts', store_layouts, buckets, memory_bytes)
    return SqliteStore(directory/'counts.db', store_layouts, buckets, memory_bytes)


class Checkpointed:
    "A store that is checkpointed as a training run does it, and can crash"
    def __init__(self, kind, directory, buckets, memory_bytes):
        self.open = lambda: opened(kind, directory, buckets, memory_bytes)
        self.path, self.store = directory/f'{kind}.checkpoint', self.open()

    def save(self, settle=True):
        facts, arrays = self.store.state((dict(processed=1), np.zeros(1, np.uint8)))
        write_arrays(self.path, 'checkpoint', facts, arrays)
        if settle: self.store.settle()

    def crash(self):
        self.store.close()
        self.store = self.open()
        if self.path.exists():
            file = ArrayFile(self.path)
            self.store.restore(file.header, {name: file[name] for name in file})
        else: self.store.restore({}, {})

    def tables(self): return {name: table for name in self.store.names() if (table := counter_of(store_layouts(name), *self.store.blocks(name)))}


steps = st.lists(st.tuples(st.sampled_from(['add', 'add', 'add_run', 'save', 'save unsettled', 'crash']), st.sampled_from(NAMES), st.integers(0, 2**32)), max_size=14)


@settings(max_examples=30, deadline=None)
@given(steps, st.sampled_from([4, 64, 1 << 14]), st.sampled_from([1, 100_000, None]))
def test_three_stores_one_table(tmp_path_factory, steps, buckets, memory_bytes):
    directory = tmp_path_factory.mktemp('stores')
    stores = [Checkpointed(kind, directory, buckets, memory_bytes) for kind in ('memory', 'memmap', 'sqlite')]
    now, saved = {}, {}
    for step, name, seed in steps:
        rng, layout = random.Random(seed), store_layouts(name)
        rows = [tuple(rng.randrange(4) for _ in layout.bits) for _ in range(rng.randrange(60))]
        counter = Counter({row: rng.choice(LARGE) for row in rows[:9]}) if step == 'add_run' else Counter(rows)
        if step.startswith('add'): now[name] = now.get(name, Counter()) + counter
        for each in stores:
            if step == 'add': each.store.add(name, pack(layout, rows))
            elif step == 'add_run': each.store.add_run(name, *run_of(layout, counter))
            elif step.startswith('save'): each.save(step == 'save')
            else: each.crash()
        if step.startswith('save'): saved = dict(now)
        if step == 'crash': now = dict(saved)
    for each in stores:
        assert each.tables() == {name: table for name, table in now.items() if table}, each.store.kind
        each.store.close()


def test_memory_limit_says_what_to_do():
    store = MemoryStore(lambda name: LAYOUTS[0], memory_bytes=100_000)
    with pytest.raises(MemoryLimitError, match='--max-ram-mb'):
        for start in range(0, 256**3, 4096): store.add('ngram', LAYOUTS[0].pack([np.arange(start, start + 4096) >> shift & 255 for shift in (16, 8, 0)]))


@pytest.mark.parametrize('kind', ['memmap', 'sqlite'])
def test_one_writer_at_a_time(python, tmp_path, kind):
    with closing(opened(kind, tmp_path, 64, None)):
        with pytest.raises(LockedError, match=f'process {os.getpid()}'): opened(kind, tmp_path, 64, None)
        program = f'from tests.test_groove_counts import opened; from pathlib import Path; opened({kind!r}, Path({str(tmp_path)!r}), 64, None)'
        done = python('-c', program)
        assert done.returncode == 1 and 'LockedError' in done.stderr and f'process {os.getpid()}' in done.stderr
    opened(kind, tmp_path, 64, None).close()  # free again


def test_what_is_no_database_is_refused(tmp_path):
    (tmp_path/'counts.db').write_bytes(b'MThd' + bytes(4096))
    with pytest.raises(FormatError, match='--db-path'): opened('sqlite', tmp_path, 64, None)
    assert (tmp_path/'counts.db').read_bytes() == b'MThd' + bytes(4096)


# A process that counts, with checkpoints, and is killed

BATCHES = 72


def batch_keys(number):
    "Batch `number` of a fixed stream: (name, keys)"
    rng = np.random.default_rng(number)
    return [(name, store_layouts(name).pack((rng.zipf(1.5, (len(store_layouts(name).bits), 400)) - 1).clip(0, 200))) for name in NAMES]


def count_with_checkpoints(kind, directory, limit=None):
    "Count all batches from the last checkpoint on, saving after every third; print each"
    run = Checkpointed(kind, directory, 256, 20_000)
    done = 0
    if run.path.exists():
        own = run.store.progress() if kind == 'sqlite' else None
        done = ArrayFile(run.path).header['done'] if own is None else own[0]['done']
        run.crash()
    elif kind == 'sqlite' and run.store.progress(): done = run.store.progress()[0]['done']
    else: run.crash()
    for number in range(done, BATCHES):
        for name, keys in batch_keys(number): run.store.add(name, keys)
        if number % 3 == 2:
            facts, arrays = run.store.state((dict(done=number + 1), np.zeros(1, np.uint8)))
            write_arrays(run.path, 'checkpoint', dict(facts, done=number + 1), arrays)
            run.store.settle()
        print(number, flush=True)
    tables = {name: [[keys.tolist(), counts.tolist()] for keys, counts in [merge_runs(list(run.store.blocks(name)))]] for name in run.store.names()}
    (directory/'tables.json').write_text(json.dumps(tables, sort_keys=True))
    run.store.close()


@pytest.mark.parametrize('kind', ['memmap', 'sqlite'])
def test_killed_and_restored_counts_are_exact(tmp_path, kind):
    program = f'from tests.test_groove_counts import count_with_checkpoints; from pathlib import Path; count_with_checkpoints({kind!r}, Path({str(tmp_path)!r}))'
    rng, kills = random.Random(f'kill {kind}'), 0
    while kills < 20:
        process = subprocess.Popen([sys.executable, '-c', program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        alive = kills < 4
        for line in process.stdout:
            if alive and int(line) % 18 >= 6 + rng.randrange(8):
                time.sleep(rng.random() * 0.02)  # somewhere within the next batches
                process.send_signal(signal.SIGKILL)
                kills += 1
                break
        process.stdout.close()
        code = process.wait(timeout=60)
        if code == 0: break
        assert code == -signal.SIGKILL
    assert kills >= 3
    found = json.loads((tmp_path/'tables.json').read_text())
    expected = {name: Counter() for name in NAMES}
    for number in range(BATCHES):
        for name, keys in batch_keys(number): expected[name].update(map(tuple, keys.tolist()))
    assert {name: dict(zip(map(tuple, keys), counts)) for name, [[keys, counts]] in found.items()} == {name: dict(table) for name, table in expected.items()}


# A disk that is full: a limit on the size of files makes the same error at the same place

FULL = '''
import resource, signal, sys
from tests.test_groove_counts import *
kind, directory = sys.argv[1], Path(sys.argv[2])
run = Checkpointed(kind, directory, 64, 10_000)
for number in range(3):
    for name, keys in batch_keys(number): run.store.add(name, keys)
run.save()
before = run.path.read_bytes()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    for number in range(3, 200):
        for name, keys in batch_keys(number): run.store.add(name, keys)
        if number % 40 == 0:
            run.save()
            before = run.path.read_bytes()
            print('saved', number, flush=True)
except Exception as error: print(f'{type(error).__module__}.{type(error).__name__}: {error}')
else: print('no error')
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert run.path.read_bytes() == before, 'the checkpoint before must stay'
'''


@pytest.mark.parametrize('kind, limit', [('memory', 20_000), ('memmap', 8_000), ('memmap', 40_000), ('sqlite', 400_000)])
def test_full_disk_keeps_the_checkpoint_before(tmp_path, python, kind, limit):
    done = python('-c', FULL, kind, tmp_path, limit)
    assert done.returncode == 0, done.stderr
    *saved, error = done.stdout.splitlines()
    assert error.startswith(('builtins.OSError', 'sqlite3.OperationalError', 'datatools.')), done.stdout
    last = int(saved[-1].split()[1]) if saved else 2
    run = Checkpointed(kind, tmp_path, 64, 10_000)
    run.crash()
    expected = {name: Counter() for name in NAMES}
    for number in range(last + 1):
        for name, keys in batch_keys(number): expected[name].update(map(tuple, store_layouts(name).unpack(keys).tolist()))
    assert run.tables() == expected
    assert not list(tmp_path.rglob('*.tmp'))
    run.store.close()
