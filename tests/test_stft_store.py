"The store: killed anywhere it comes out the same, its readers survive forks and growth, and no damaged file ends the process"

import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import threading
import time
from dataclasses import replace

import lmdb
import numpy as np
import pytest

from datatools.core import DatatoolsError, FormatError, LockedError, MismatchError, UsageError, hash_file
from datatools.stft import pages, store
from datatools.stft.records import decode_record, encode_record
from datatools.stft.store import StoreWriter, check_file, environment, item_key, item_offsets, open_store

ITEMS = 60
CONFIG = dict(sample_rate=44100, windows=[256, 2048])


def a_record(index):
    "Records of many sizes: in a leaf, in one page, in many"
    size = [100, 700, 3_000, 9_000, 40_000][index % 5] + index
    return encode_record(index, dict(x=np.random.default_rng(index).integers(0, 256, size, dtype=np.uint8)), dict(source=f'{index}.wav'))


RECORDS = [a_record(index) for index in range(ITEMS)]


def write(path, items=ITEMS, acknowledge=None, complete=True, **options):
    "Write or go on writing the store of these tests"
    options = dict(commit_bytes=50_000, map_size=1 << 16, resume=True) | options
    with StoreWriter(path, CONFIG, **options) as writer:
        if writer.is_complete: return writer.complete()
        for index in range(items):
            if index % 7 == 0: writer.source(f'refused {index * 7919 % 1000}.wav', 'it is empty')
            if index < writer.count: continue
            writer.append(RECORDS[index])
            writer.source(f'{index * 7919 % 1000}.wav', dict(item=index))
            if acknowledge: acknowledge(writer.committed)
        if complete: writer.complete(items=items)


def in_child(function, *arguments):
    "Run a function in a forked child; its exit status"
    process = os.fork()
    if not process:
        code = 1
        try:
            function(*arguments)
            code = 0
        except BaseException as error: print(repr(error), flush=True)
        finally: os._exit(code)
    return process


def joined(process):
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def check(path, items=ITEMS):
    "All items are what they should be"
    with environment(path) as handle:
        assert handle.info().count == items
        for index in range(items):
            with handle.begin() as txn: assert bytes(txn.get(item_key(index), db=handle.items)) == RECORDS[index]
        assert handle.sources()[f'{(items - 1) * 7919 % 1000}.wav'] == dict(item=items - 1)
    offsets, lengths = item_offsets(path)
    content = open_store(path).path.read_bytes()
    assert [content[offset:offset + length] for offset, length in zip(offsets, lengths)] == [bytes(record) for record in RECORDS[:items]]


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp('reference')/'train.lmdb'
    write(path)
    return path


def test_round_trip(reference):
    info = open_store(reference)
    assert (info.count, info.complete, info.config, info.constant_schema, info.facts) == (ITEMS, True, CONFIG, False, dict(items=ITEMS))
    check(reference)
    for index in (0, 7, ITEMS - 1): assert environment(reference).record(index, verify=True).metadata == dict(source=f'{index}.wav')
    for index in (-1, ITEMS, 1 << 62):
        with pytest.raises(IndexError): environment(reference).record(index)


def kill_until_complete(path, delays, random_delay):
    "Write in children that are killed; what they acknowledged is there each time"
    kills = 0
    for _ in range(delays):
        read, written = os.pipe()
        child = in_child(write, path, ITEMS, lambda count: os.write(written, bytes([count])))
        time.sleep(random_delay())
        os.kill(child, signal.SIGKILL)
        status = joined(child)
        os.close(written)
        acknowledged = max(os.read(read, 1 << 16), default=0)
        os.close(read)
        if (path/'data.mdb').exists(): assert open_store(path).count >= acknowledged
        if status == 0: break
        assert status == -signal.SIGKILL
        kills += 1
    return kills


def drill(path, reference, seconds, seed):
    chance, end, kills, runs = random.Random(seed), time.monotonic() + seconds, 0, 0
    started = time.monotonic()
    write(path)
    duration = time.monotonic() - started
    while time.monotonic() < end:
        shutil.rmtree(path)
        kills += kill_until_complete(path, chance.choice([1, 3, 10, 30]), lambda: chance.uniform(0, duration / chance.choice([1, 2, 4])))
        write(path)
        assert hash_file(path/'data.mdb') == hash_file(reference/'data.mdb')
        assert sorted(os.listdir(path)) == ['data.mdb', 'writer.lock']
        runs += 1
    return runs, kills


def test_killed_anywhere_the_file_comes_out_the_same(tmp_path, reference):
    runs, kills = drill(tmp_path/'train.lmdb', reference, 12, seed=0)
    assert runs >= 3 and kills >= 10
    check(tmp_path/'train.lmdb')


def test_killed_while_it_is_made(tmp_path, reference):
    "Between the rename of a new data.mdb and the removal of the folder it was made in"
    write(tmp_path/'train.lmdb', 0, complete=False)
    (tmp_path/'train.lmdb'/'.new').mkdir()
    write(tmp_path/'train.lmdb')
    assert sorted(os.listdir(tmp_path/'train.lmdb')) == ['data.mdb', 'writer.lock']
    assert hash_file(tmp_path/'train.lmdb'/'data.mdb') == hash_file(reference/'data.mdb')


@pytest.mark.drill
def test_killed_for_ten_minutes_the_file_comes_out_the_same(tmp_path, reference):
    runs, kills = drill(tmp_path/'train.lmdb', reference, 600, seed=time.time_ns())
    print(f'{runs} stores, {kills} kills')


def test_interrupted_inside_every_transaction(tmp_path, reference, monkeypatch):
    "Children die after so many puts, in the transaction and just after it"
    put = store._put
    for deaths in range(0, 40, 3):
        path = tmp_path/f'{deaths}.lmdb'
        def dying(*arguments, left=[deaths]):
            put(*arguments)
            if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
        def attempt():
            store._put = dying
            write(path)
        assert joined(in_child(attempt)) == -signal.SIGKILL
        write(path)
        assert hash_file(path/'data.mdb') == hash_file(reference/'data.mdb')


def test_resume_after_every_number_of_items(tmp_path, reference):
    path = tmp_path/'train.lmdb'
    for items in range(0, ITEMS, 2):
        with pytest.raises(KeyboardInterrupt), StoreWriter(path, CONFIG, commit_bytes=50_000, map_size=1 << 16, resume=True) as writer:
            for index in range(writer.count, items):
                writer.append(RECORDS[index])
                writer.source(f'{index * 7919 % 1000}.wav', dict(item=index))
                if index % 7 == 0: writer.source(f'refused {index * 7919 % 1000}.wav', 'it is empty')
            raise KeyboardInterrupt
    write(path, map_size=1 << 20, commit_bytes=1)  # what decides the bytes is taken from the store
    check(path)


def test_a_new_store_appears_whole(tmp_path, reference, monkeypatch):
    "Killed while the store is made: there is none, and the next writer begins"
    def dying(*_): os.kill(os.getpid(), signal.SIGKILL)
    for name in ('sync', 'replace'):
        path = tmp_path/name
        def attempt():
            if name == 'replace': os.replace = dying
            else: store.canonical_json = lambda value: dying() if value == 0 else b'{}'
            write(path)
        assert joined(in_child(attempt)) == -signal.SIGKILL
        assert not (path/'data.mdb').exists()
        with pytest.raises(FileNotFoundError): open_store(path)
        write(path)
        assert hash_file(path/'data.mdb') == hash_file(reference/'data.mdb')


def test_a_full_map_is_doubled(tmp_path, monkeypatch):
    "Even where the estimate of the room was wrong"
    tried, transaction = [], StoreWriter._transaction
    monkeypatch.setattr(store, 'check_file', lambda path, real=check_file: replace(real(path), page_size=16))
    monkeypatch.setattr(StoreWriter, '_transaction', lambda self, size, final: (tried.append((self.committed, size)), transaction(self, size, final)))
    write(tmp_path/'train.lmdb')
    assert len(tried) > len({committed for committed, _ in tried}) + 1  # some were repeated
    for index in range(20):
        child = in_child(write, tmp_path/'again.lmdb')
        time.sleep(index / 200)
        os.kill(child, signal.SIGKILL)
        joined(child)
    write(tmp_path/'again.lmdb')
    assert hash_file(tmp_path/'again.lmdb'/'data.mdb') == hash_file(tmp_path/'train.lmdb'/'data.mdb')
    monkeypatch.undo()
    check(tmp_path/'train.lmdb')


def test_two_writers(tmp_path):
    path = tmp_path/'train.lmdb'
    ready, go = os.pipe(), os.pipe()
    def hold():
        with StoreWriter(path, CONFIG):
            os.write(ready[1], b'x')
            os.read(go[0], 1)
    child = in_child(hold)
    os.read(ready[0], 1)
    with pytest.raises(LockedError, match=f'process {child}'): StoreWriter(path, CONFIG, resume=True)
    os.write(go[1], b'x')
    assert joined(child) == 0
    StoreWriter(path, CONFIG, resume=True).close()


def test_wrong_use(tmp_path, reference):
    with pytest.raises(UsageError, match='Resume'): StoreWriter(reference, CONFIG)
    with pytest.raises(MismatchError, match='windows'): StoreWriter(reference, CONFIG | dict(windows=[512]), resume=True)
    for wrong in (dict(durability='none'), dict(map_size=10), dict(map_size=True), dict(commit_bytes=0), dict(commit_bytes=1.5)):
        with pytest.raises(UsageError, match=next(iter(wrong))): StoreWriter(tmp_path/'new.lmdb', CONFIG, **wrong)
    assert not (tmp_path/'new.lmdb'/'data.mdb').exists()
    with StoreWriter(reference, CONFIG, resume=True) as writer:
        with pytest.raises(DatatoolsError, match='is complete'): writer.append(RECORDS[0])
        writer.complete()
    with StoreWriter(tmp_path/'new.lmdb', CONFIG) as writer:
        with pytest.raises(FormatError): writer.append(b'no record')
        with pytest.raises(UsageError, match='item 5'): writer.append(RECORDS[5])
        with pytest.raises(UsageError, match='key'): writer.source('', {})
        with pytest.raises(UsageError, match='JSON'): writer.source('a', float('nan'))
        with environment(tmp_path/'new.lmdb'):
            writer.append(RECORDS[0])
            with pytest.raises(DatatoolsError, match='open for reading in this process'): writer.commit()
        writer.commit()  # what was collected is still there
    assert open_store(tmp_path/'new.lmdb').count == 1


def test_sources_of_any_name(tmp_path):
    names = ['ä/ö.wav', 'x' * 600, 'x' * 601, 'odd \udcff.wav', 'a' * 511]
    with StoreWriter(tmp_path/'train.lmdb', CONFIG) as writer:
        for number, name in enumerate(names): writer.source(name, number)
    with environment(tmp_path/'train.lmdb') as handle: assert handle.sources() == {name: number for number, name in enumerate(names)}
    with StoreWriter(tmp_path/'train.lmdb', CONFIG, resume=True) as writer: assert writer.sources()['x' * 600] == 1


@pytest.fixture
def small_disk(tmp_path):
    "A filesystem of 2 MiB"
    folder = tmp_path/'disk'
    folder.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=2m', 'tmpfs', str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True).returncode: pytest.skip('needs the right to mount a filesystem')
    yield folder
    subprocess.run(['umount', '-l', str(folder)], check=True)


def test_disk_full(small_disk, reference):
    path = small_disk/'train.lmdb'
    (small_disk/'other').write_bytes(bytes(1_500_000))
    with pytest.raises(OSError, match='No space left') as caught: write(path)
    assert caught.value.errno == 28
    count = open_store(path).count
    assert 0 < count < ITEMS
    with StoreWriter(path, CONFIG, resume=True) as writer:
        with pytest.raises(OSError, match='No space left'):
            for index in range(writer.count, ITEMS):
                writer.append(RECORDS[index])
                writer.source(f'{index * 7919 % 1000}.wav', dict(item=index))
            writer.commit()
        assert writer.committed >= count
        (small_disk/'other').unlink()
        index = writer.count
        writer.commit()
        assert open_store(path).count == index
    write(path)
    check(path)


def test_disk_full_then_resumed_is_the_same_file(small_disk, reference):
    path = small_disk/'train.lmdb'
    for size in (1_900_000, 1_700_000, 1_500_000, 1_400_000):
        (small_disk/'other').write_bytes(bytes(size))
        with pytest.raises(OSError, match='No space left'): write(path)
        (small_disk/'other').unlink()
    write(path)
    assert hash_file(path/'data.mdb') == hash_file(reference/'data.mdb')


def test_cut_and_garbage_files(tmp_path, reference):
    content = (reference/'data.mdb').read_bytes()
    path = tmp_path/'cut.lmdb'
    path.mkdir()
    for length in [0, 1, 15, 152, 153, 4095, 4096, 4250, 8191, 8192, *range(9000, len(content), 100_003), len(content) - 1]:
        (path/'data.mdb').write_bytes(content[:length])
        with pytest.raises(FormatError): open_store(path)
        with pytest.raises(FormatError): item_offsets(path)
    for garbage in (bytes(100_000), os.urandom(100_000), b'SQLite format 3\0' * 1000):
        (path/'data.mdb').write_bytes(garbage)
        with pytest.raises(FormatError, match='not an LMDB file'): open_store(path)
    for missing in (tmp_path/'nothing', tmp_path):
        with pytest.raises(FileNotFoundError, match='no store here'): open_store(missing)


def test_damaged_pages_of_the_tree(tmp_path, reference):
    "The walk over the tree gives an error or numbers inside the file, whatever the pages hold"
    content, chance = (reference/'data.mdb').read_bytes(), random.Random(0)
    facts = check_file(reference/'data.mdb')
    for _ in range(300):
        damaged = bytearray(content)
        leaves = [page for page in range(2, facts.last_page + 1) if content[page * 4096 + 10] in (1, 2)]
        for _ in range(chance.randint(1, 20)): damaged[chance.choice(leaves) * 4096 + chance.randrange(8, 120)] = chance.randrange(256)
        (tmp_path/'damaged.mdb').write_bytes(damaged)
        try: offsets, lengths = pages.item_places(tmp_path/'damaged.mdb', facts)
        except FormatError: continue
        assert not len(offsets) or (offsets.min() >= 0 and (offsets + lengths).max() <= len(content))


def foreign(path, **items):
    "An LMDB environment that somebody else wrote"
    with lmdb.open(str(path), max_dbs=8, map_size=1 << 24) as env:
        for name, pairs in items.items():
            options = pairs.pop('options', {})
            database = env.open_db(name.encode(), **options)
            with env.begin(write=True, db=database) as txn:
                for key, value in pairs.items(): txn.put(key, value)


def test_foreign_environments(tmp_path, reference):
    foreign(tmp_path/'other', items={b'0': b'x'})
    with pytest.raises(FormatError, match='no sub-databases'): open_store(tmp_path/'other')
    foreign(tmp_path/'no_meta', items={}, meta={}, src={})
    with pytest.raises(FormatError, match='not a store of'): open_store(tmp_path/'no_meta')
    with lmdb.open(str(tmp_path/'new'), map_size=1 << 24, lib_version=1): pass
    with pytest.raises(FormatError, match='newer data version'): open_store(tmp_path/'new')
    with environment(reference) as handle, handle.begin() as txn: meta = {bytes(key): bytes(value) for key, value in txn.cursor(handle.meta)}
    for number, (change, message) in enumerate([
            ({b'version': b'2'}, 'update datatools'), ({b'format': b'"other"'}, 'not a store of'), ({b'count': b'-1'}, 'items are counted'),
            ({b'count': b'"3"'}, 'count is'), ({b'count': b'7'}, '7 items are counted'), ({b'schema': b'[["x","|O",[1]]]'}, 'dtype'),
            ({b'config': b'{'}, 'not valid JSON'), ({b'config': b'[' * 1900}, 'not valid JSON'), ({b'complete': b'1'}, 'complete is')]):
        foreign(tmp_path/str(number), items={item_key(0): b'x'}, meta=meta | {b'count': b'1'} | change, src={})
        with pytest.raises(FormatError, match=message): open_store(tmp_path/str(number))
    for number, options, keys in ((20, {}, [b'0', b'1']), (21, dict(integerkey=True), [item_key(0), item_key(1)]), (22, dict(dupsort=True), [item_key(0), item_key(1)])):
        foreign(tmp_path/str(number), items={key: b'x' for key in keys} | dict(options=options), meta=meta | {b'count': b'2'}, src={})
        with pytest.raises(FormatError, match='keys of its items'): open_store(tmp_path/str(number))
    foreign(tmp_path/'hole', items={item_key(0): b'x', item_key(2): b'x'}, meta=meta | {b'count': b'2'}, src={})
    with pytest.raises(FormatError, match='items are counted'): open_store(tmp_path/'hole')


def test_a_reader_survives_growth(tmp_path):
    "Another process makes the map many times larger while this one reads"
    path = tmp_path/'train.lmdb'
    write(path, items=3, complete=False)
    handle = environment(path)
    small = handle.info().map_size
    assert joined(in_child(write, path)) == 0
    with handle.begin() as txn: assert bytes(txn.get(item_key(ITEMS - 1), db=handle.items)) == RECORDS[-1]
    assert handle.info().map_size > small and handle.info().complete
    handle.close()
    check(path)


def test_a_snapshot_stays_what_it_was(tmp_path):
    path = tmp_path/'train.lmdb'
    write(path, items=20, complete=False)
    with environment(path) as handle, handle.begin() as txn:
        writer = multiprocessing.get_context('spawn').Process(target=write, args=(path,))
        writer.start()
        writer.join()
        assert writer.exitcode == 0
        assert txn.get(item_key(19), db=handle.items) == RECORDS[19] and txn.get(item_key(40), db=handle.items) is None
        assert txn.get(b'count', db=handle.meta) == b'20'
    check(path)


def test_deleted_and_replaced_under_a_reader(tmp_path, reference):
    path = tmp_path/'train.lmdb'
    shutil.copytree(reference, path)
    with environment(path) as handle:
        shutil.rmtree(path)
        assert handle.record(5).index == 5 and handle.info().count == ITEMS
        with pytest.raises(FileNotFoundError, match='no store here'): environment(path)
        write(path, items=4)
        assert handle.info().count == ITEMS and open_store(path).count == 4


def read_some(handle, start):
    for index in range(start, ITEMS, 4): assert decode_record(RECORDS[index]).fields['x'].tobytes() == handle.record(index).fields['x'].tobytes()


def test_one_environment_per_process(reference):
    first, second = environment(reference), environment(reference/'data.mdb')
    assert first.env is second.env
    first.close()
    first.close()
    with pytest.raises(DatatoolsError, match='closed'): first.env
    read_some(second, 0)
    del second
    assert not store._registry
    lmdb.open(str(reference), readonly=True, lock=False).close()  # nothing of ours is open


@pytest.mark.parametrize('complete', [True, False])
def test_forked_and_spawned_readers(tmp_path, reference, complete):
    if not complete: write(tmp_path/'train.lmdb', complete=False)
    with environment(reference if complete else tmp_path/'train.lmdb') as handle, handle.begin() as txn:
        before = txn.get(item_key(0), db=handle.items)
        children = [in_child(read_some, handle, start) for start in range(4)]
        read_some(handle, 0)
        assert [joined(child) for child in children] == [0] * 4
        grandchild = in_child(lambda: [read_some(handle, 1), os._exit(joined(in_child(read_some, handle, 2)))])
        assert joined(grandchild) == 0
        assert before == RECORDS[0]
        process = multiprocessing.get_context('spawn').Process(target=read_some, args=(handle, 3))
        process.start()
        process.join()
        assert process.exitcode == 0
        assert pickle.loads(pickle.dumps(handle)).env is handle.env
    assert not store._registry


def test_many_threads(reference):
    errors = []
    def work(start):
        try:
            for _ in range(20):
                with environment(reference) as handle: read_some(handle, start)
        except BaseException as error: errors.append(error)
    threads = [threading.Thread(target=work, args=(start % 4,)) for start in range(8)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert not errors and not store._registry


def test_network_filesystems_are_told(tmp_path, reference, monkeypatch):
    monkeypatch.setattr(pages, 'network_filesystem', lambda path: 'NFS')
    pages._warn_of_network.cache_clear()
    with pytest.warns(UserWarning, match='network filesystem .NFS.'): open_store(reference)
    pages._warn_of_network.cache_clear()


def test_opening_is_fast_and_flat(tmp_path):
    "The time to open does not grow with the number of items"
    times = []
    for items in (10, 20_000):
        path = tmp_path/str(items)
        with StoreWriter(path, CONFIG) as writer:
            for index in range(items): writer.append(encode_record(index, dict(x=np.float32(index))))
        best = 1.0
        for _ in range(50):
            started = time.perf_counter()
            assert open_store(path).count == items
            best = min(best, time.perf_counter() - started)
        times.append(best)
    assert times[1] < 3 * times[0] + 1e-4, times


def test_a_complete_store_that_grows_again(tmp_path):
    with StoreWriter(tmp_path/'store', {}) as writer:
        writer.append(encode_record(0, {'x': np.zeros(3)}))
        writer.complete(known=1)
    before = open_store(tmp_path/'store')
    writer = StoreWriter(tmp_path/'store', {}, resume=True)
    with pytest.raises(DatatoolsError, match='is complete: nothing can be added'): writer.source('a', 1)
    assert not (tmp_path/'store/lock.mdb').exists()
    writer.reopen()
    writer.reopen()  # the second time there is nothing to do
    assert (tmp_path/'store/lock.mdb').exists() and not open_store(tmp_path/'store').complete
    writer.append(encode_record(1, {'x': np.ones(3)}))
    writer.complete(known=2)
    writer.close()
    with pytest.raises(DatatoolsError, match='closed'): writer.reopen()
    after = open_store(tmp_path/'store')
    assert (before.count, after.count, after.facts, after.complete) == (1, 2, {'known': 2}, True)
