"Shards: killed anywhere each file is whole or absent, however a stream is cut the files are the same, and no damaged file is read as a sound one"

import json
import os
import pickle
import random
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings, strategies as st

from datatools.arrays import ArrayFile, write_arrays
from datatools.core import DatatoolsError, FormatError, LockedError, MismatchError, UsageError, config_hash, hash_file
from datatools.jobs import Task, run_tasks
from datatools.pool import shards
from datatools.pool.codecs import RecordCodec, codec_from_facts, dtype_from_json, dtype_to_json
from datatools.pool.shards import (ShardDirectory, ShardWriter, compress_directory, decompress_directory, finish_directory, shard_files,
                                   write_shard)

DTYPE = np.dtype([('number', '<u4'), ('value', '<f4'), ('planes', 'u1', (8,))])
CODEC = RecordCodec(DTYPE)


def some_records(count, first=0):
    records = np.zeros(count, DTYPE)
    records['number'] = np.arange(first, first + count)
    records['value'] = records['number'] / 7
    records['planes'] = (records['number'][:, None] * np.arange(1, 9)) % 251
    return records


def games_of(lengths): return np.repeat(np.arange(len(lengths), dtype=np.uint64) * 2**40, lengths)


def content(directory): return {path.name: hash_file(path) for path in sorted(Path(directory).iterdir())}


def small(path, count=40, **options):
    "A finished directory of several shards"
    with ShardWriter(path, CODEC, **dict(rows_per_shard=16, source='test') | options) as writer:
        writer.append(some_records(count), np.arange(count) // 5)
    return ShardDirectory.open(path)


def edit_manifest(path, change, rehash=True):
    file = Path(path)/'manifest.json'
    fields = json.loads(file.read_text())
    change(fields)
    if rehash: fields['config_hash'] = config_hash(fields['config'])
    file.write_text(json.dumps(fields))


# --- Kills

def write_stream(directory, pause=0.):
    with ShardWriter(directory, CODEC, rows_per_shard=500, source='stream') as writer:
        for start in range(0, 6000, 100):
            writer.append(some_records(100, start), np.arange(start, start + 100) // 30)
            time.sleep(pause)


def forked(function, *arguments):
    process = os.fork()
    if not process:
        code = 1
        try:
            function(*arguments)
            code = 0
        finally: os._exit(code)
    return process


def test_killed_anywhere_each_shard_is_whole_or_absent(tmp_path):
    write_stream(tmp_path/'whole')
    expected, generator, stages = content(tmp_path/'whole'), random.Random(5), set()
    assert len(expected) > 10
    for attempt in range(25):
        directory = tmp_path/f'killed {attempt}'
        process = forked(write_stream, directory, .002)
        time.sleep(generator.uniform(.005, .25))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        if not directory.exists(): continue
        found = content(directory)
        finished = 'manifest.json' in found
        stages.add((finished, bool(shard_files(directory))))
        for path in shard_files(directory):
            ArrayFile(path).verify()
            assert found[path.name] == expected[path.name]
        if finished: ShardDirectory.open(directory).verify()
        else:
            with pytest.raises(FormatError, match='has no manifest.json'): ShardDirectory.open(directory)
            write_stream(directory)
        found = content(directory)
        found.pop('writer.lock', None)  # killed between the manifest and the end
        assert found == expected
    assert (False, True) in stages  # some were killed in the middle


def task(directory, number, pause):
    time.sleep(pause)
    return write_shard(Path(directory)/f'part_{number}.records', some_records(50, 50 * number), np.full(50, number), CODEC).name


def job(directory, pause=0.):
    directory.mkdir(exist_ok=True)
    tasks = [Task(str(number), (str(directory), number, pause)) for number in range(12)]
    for result in run_tasks(task, tasks, workers=0, ledger=directory/'ledger'):
        if result.error: raise result.error
    finish_directory(directory, CODEC, 'many workers')


def test_a_job_of_many_tasks_is_resumed_to_the_same_manifest(tmp_path):
    job(tmp_path/'whole')
    expected = hash_file(tmp_path/'whole/manifest.json')
    directory, generator = tmp_path/'killed', random.Random(7)
    for _ in range(4):
        process = forked(job, directory, .02)
        time.sleep(generator.uniform(.03, .12))
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    job(directory)
    job(directory)
    assert hash_file(directory/'manifest.json') == expected
    assert [shard.path.name for shard in ShardDirectory.open(directory).shards] == [f'part_{number}.records' for number in range(12)]


def test_no_half_file_when_the_disk_is_full(tmp_path):
    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            with ShardWriter(tmp_path/'full', CODEC, rows_per_shard=100_000) as writer:
                for start in range(0, 100_000, 1000): writer.append(some_records(1000, start))
        except OSError: os._exit(42)
    assert os.waitstatus_to_exitcode(os.waitpid(forked(write), 0)[1]) == 42
    assert [*content(tmp_path/'full')] == ['writer.lock']


# --- The writer

@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=30), cuts=st.lists(st.integers(0, 500), max_size=20), most=st.integers(1, 60))
def test_files_do_not_depend_on_blocks_and_no_game_is_torn(tmp_path_factory, lengths, cuts, most):
    folder = tmp_path_factory.mktemp('cuts')
    records, game = some_records(sum(lengths)), games_of(lengths)
    with ShardWriter(folder/'once', CODEC, most) as writer: writer.append(records, game)
    with ShardWriter(folder/'blocks', CODEC, most) as writer:
        for block, block_game in zip(np.split(records, sorted(cuts)), np.split(game, sorted(cuts))): writer.append(block, block_game)
    assert content(folder/'once') == content(folder/'blocks')
    written = ShardDirectory.open(folder/'once').shards
    assert np.array_equal(np.concatenate([shard.records() for shard in written]), records)
    assert sum(shard.game_count for shard in written) == len(lengths)  # each in one shard only
    for shard, following in zip(written, [*written[1:], None]):
        assert shard.rows <= most or shard.game_count == 1
        if following is not None: assert shard.rows + np.sum(game == following.games()[0]) > most  # the next game had no room


@pytest.mark.parametrize('blocks', [[1000], [1, 999], [333, 333, 334], [0, 1000, 0]])
def test_without_games_all_shards_but_the_last_are_full(tmp_path, blocks):
    with ShardWriter(tmp_path/'plain', CODEC, 300) as writer:
        for stop, size in zip(np.cumsum(blocks), blocks): writer.append(some_records(size, int(stop - size)))
    directory = ShardDirectory.open(tmp_path/'plain')
    assert [shard.rows for shard in directory.shards] == [300, 300, 300, 100]
    assert [shard.offset for shard in directory.shards] == [0, 300, 600, 900]
    assert directory.shards[0].games() is None and directory.shards[0].game_count is None
    assert np.array_equal(np.concatenate([shard.records()['number'] for shard in directory.shards]), np.arange(1000))


def test_a_block_may_be_reused_by_the_producer(tmp_path):
    block, game = some_records(10), np.zeros(10, np.int64)
    with ShardWriter(tmp_path/'reused', CODEC) as writer:
        for number in range(5):
            block[:], game[:] = some_records(10, 10 * number), number
            writer.append(block, game)
            block['number'], game[:] = 0, 99
    assert np.array_equal(ShardDirectory.open(tmp_path/'reused').shards[0].records(), some_records(50))


def test_what_the_writer_refuses(tmp_path):
    for rows in (0, -1, 2.5, True, '8'):
        with pytest.raises(UsageError, match='rows_per_shard'): ShardWriter(tmp_path/'no', CODEC, rows)
    with ShardWriter(tmp_path/'a', CODEC) as writer:
        with pytest.raises(UsageError, match='records.dtype'): writer.append(np.zeros(3))
        with pytest.raises(UsageError, match='records.shape'): writer.append(np.zeros((3, 2), DTYPE))
        with pytest.raises(UsageError, match='game'): writer.append(some_records(3), [1, 2])
        with pytest.raises(UsageError, match='game'): writer.append(some_records(3), [1., 2., 3.])
        writer.append(some_records(3))
        with pytest.raises(UsageError, match='in all calls'): writer.append(some_records(3), [1, 2, 3])
        with pytest.raises(LockedError): ShardWriter(tmp_path/'a', CODEC).__enter__()
        directory = writer.finish()
        with pytest.raises(DatatoolsError, match='closed'): writer.append(some_records(1))
        with pytest.raises(DatatoolsError, match='closed'): writer.finish()
    assert len(directory) == 3
    with pytest.raises(DatatoolsError, match='closed'): ShardWriter(tmp_path/'b', CODEC).append(some_records(1))


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(UsageError, match=r'\*\.records'):
        with ShardWriter(tmp_path/'none', CODEC): pass
    with ShardWriter(tmp_path/'none', CODEC) as writer: writer.append(some_records(1))  # what failed does not stand in the way
    (tmp_path/'empty').mkdir()
    write_shard(tmp_path/'empty/shard_0000.records', some_records(0), codec=CODEC)
    with pytest.raises(UsageError, match='at least one record'): finish_directory(tmp_path/'empty', CODEC)


def test_shards_of_others_are_not_overwritten(tmp_path):
    (tmp_path/'theirs').mkdir()
    write_shard(tmp_path/'theirs/shard_0000.records', some_records(5), codec=CODEC)
    before = content(tmp_path/'theirs')
    for _ in range(2):  # the second attempt finds no trace of the first
        with pytest.raises(UsageError, match='finish_directory'):
            with ShardWriter(tmp_path/'theirs', CODEC): pass
    assert content(tmp_path/'theirs') == before


# --- Strangers

def test_other_files_in_a_directory_are_nobodys_business(tmp_path):
    small(tmp_path/'mine')
    for name in ('notes.txt', '.DS_Store', '.hidden.records', 'later.records'): (tmp_path/'mine'/name).write_text('hello')
    (tmp_path/'mine/folder').mkdir()
    ShardDirectory.open(tmp_path/'mine').verify()
    compress_directory(tmp_path/'mine', tmp_path/'packed')
    assert len(shard_files(decompress_directory(tmp_path/'packed', tmp_path/'out').path)) == 3


@pytest.mark.parametrize('stranger, error, words', [
    (lambda path: path.write_text('hello'), FormatError, 'not an array file'),
    (lambda path: path.write_bytes(b''), FormatError, 'it is empty'),
    (lambda path: path.write_bytes(pickle.dumps(os.system)), FormatError, 'does not open pickles'),
    (lambda path: path.mkdir(), FormatError, 'is not a file'),
    (lambda path: path.symlink_to('nowhere'), FormatError, 'does not exist'),
    (lambda path: write_arrays(path, 'groove model', {}, dict(a=np.zeros(3))), FormatError, 'is a groove model, not a pool shard'),
    (lambda path: write_shard(path, np.zeros(3, [('a', 'u1')])), MismatchError, 'another configuration'),
    (lambda path: write_arrays(path, 'pool shard', shards._header(CODEC), dict(records=np.zeros((3, 9), np.uint8))), FormatError, 'damaged'),
    (lambda path: write_arrays(path, 'pool shard', shards._header(CODEC), dict(records=np.zeros((3, 16), np.uint8), game=np.zeros(2, np.uint64))), FormatError, 'damaged'),
    (lambda path: write_arrays(path, 'pool shard', shards._header(CODEC), {}), FormatError, 'damaged'),
])
def test_a_strangers_file_among_the_shards_is_named(tmp_path, stranger, error, words):
    write_shard(tmp_path/'shard_0000.records', some_records(5), codec=CODEC)
    stranger(tmp_path/'shard_0001.records')
    with pytest.raises(error, match=words) as caught: finish_directory(tmp_path, CODEC)
    assert 'shard_0001.records' in str(caught.value)
    assert not (tmp_path/'manifest.json').exists()


def test_what_is_no_directory_of_shards(tmp_path):
    with pytest.raises(UsageError, match='does not exist'): ShardDirectory.open(tmp_path/'none')
    (tmp_path/'file').write_text('')
    with pytest.raises(UsageError, match='no directory'): ShardDirectory.open(tmp_path/'file')
    (tmp_path/'empty').mkdir()
    with pytest.raises(FormatError, match='it is empty'): ShardDirectory.open(tmp_path/'empty')
    (tmp_path/'empty/shuffled_0001.pkl.gz').write_bytes(b'')
    with pytest.raises(FormatError, match='Convert them'): ShardDirectory.open(tmp_path/'empty')


# --- Damage

def test_each_damaged_byte_is_found(tmp_path):
    directory = small(tmp_path/'mine')
    victim = directory.shards[1].path
    good, generator = victim.read_bytes(), random.Random(3)
    for place in sorted(generator.sample(range(len(good)), 120)):
        victim.write_bytes(good[:place] + bytes([good[place] ^ (1 << generator.randrange(8))]) + good[place + 1:])
        with pytest.raises(FormatError, match='1 of 3 shards') as caught: ShardDirectory.open(directory.path).verify()
        assert str(victim) in str(caught.value) and str(directory.shards[0].path) not in str(caught.value)


@pytest.mark.parametrize('kept', [0, 1, 63, 64, 100, -1])
def test_a_truncated_shard_is_named_at_once(tmp_path, kept):
    directory = small(tmp_path/'mine')
    victim = directory.shards[2].path
    victim.write_bytes(victim.read_bytes()[:kept])
    with pytest.raises(MismatchError, match='shard_0002.records has changed since its manifest'): ShardDirectory.open(directory.path)
    edit_manifest(directory.path, lambda fields: fields['shards'][2].update(bytes=victim.stat().st_size))
    with pytest.raises(FormatError): ShardDirectory.open(directory.path).shards[2].records()
    with pytest.raises(FormatError): ShardDirectory.open(directory.path).shards[2].read(0, 1)


def test_a_shard_that_grew_or_is_gone_or_was_exchanged(tmp_path):
    directory = small(tmp_path/'mine')
    first, second, _ = [shard.path for shard in directory.shards]
    with open(first, 'ab') as file: file.write(b'x')
    with pytest.raises(MismatchError, match=f'{first.name} has changed'): ShardDirectory.open(directory.path)
    os.truncate(first, first.stat().st_size - 1)
    directory.verify()
    first.rename(tmp_path/'aside')
    with pytest.raises(MismatchError, match='it is missing'): ShardDirectory.open(directory.path)
    (tmp_path/'aside').rename(first)
    kept = first.read_bytes()
    write_shard(first, some_records(directory.shards[0].rows, 1000), np.arange(directory.shards[0].rows) // 5, CODEC)
    if first.stat().st_size == len(kept):
        with pytest.raises(FormatError, match='1 of 3 shards'): ShardDirectory.open(directory.path).verify()
        with pytest.raises(MismatchError, match='other contents'): ShardDirectory.open(directory.path).shards[0].records()
    write_shard(first, some_records(3), codec=CODEC)
    with pytest.raises(MismatchError, match='has changed'): directory.shards[0].records()  # opened before it was exchanged
    with pytest.raises(FormatError, match='1 of 3 shards'): directory.verify()
    assert len(second.read_bytes())


@pytest.mark.parametrize('read', [lambda shard: shard.records(), lambda shard: shard.games(), lambda shard: shard.read(0, 1), lambda shard: shard.first_byte, lambda shard: shard.check_unchanged()])
def test_a_change_in_place_is_found_when_a_shard_is_first_read(tmp_path, read):
    directory = small(tmp_path/'mine')
    changed, same = directory.shards[1], directory.shards[0]
    with open(changed.path, 'r+b') as file:
        file.seek(64 + 5 * DTYPE.itemsize)
        file.write(b'\xAA' * 40)
    with pytest.raises(MismatchError, match='shard_0001.records has changed since .* same size, but other contents. Restore'): read(ShardDirectory.open(directory.path).shards[1])
    with pytest.raises(MismatchError): read(changed)  # the directory was open already
    with pytest.raises(MismatchError): read(pickle.loads(pickle.dumps(changed)))
    read(same)


def test_a_large_shard_written_anew_is_found_by_its_footer(tmp_path):
    records = some_records(200_000)
    write_shard(tmp_path/'shard_0000.records', records, codec=CODEC)
    finish_directory(tmp_path, CODEC).shards[0].check_unchanged()
    records['number'][70_000] += 1
    write_shard(tmp_path/'shard_0000.records', records, codec=CODEC)
    changed = ShardDirectory.open(tmp_path)  # a digit more or less in a checksum changes the size
    with pytest.raises(MismatchError, match='other contents'): changed.shards[0].records()


def test_records_that_the_codec_refuses_are_found_by_verify(tmp_path):
    class Lenient(RecordCodec):
        def check(self, records): pass
    records = some_records(20)
    records['value'][13] = np.inf
    with ShardWriter(tmp_path/'bad', Lenient(DTYPE)) as writer: writer.append(records)
    with pytest.raises(FormatError, match="shard_0000.records: row 13: field 'value' is not finite"): ShardDirectory.open(tmp_path/'bad').verify()
    with pytest.raises(FormatError, match='row 13'):
        with ShardWriter(tmp_path/'worse', CODEC) as writer: writer.append(records)
    assert not shard_files(tmp_path/'worse')


@pytest.mark.parametrize('change', [
    lambda fields: fields['shards'][0].update(name='../elsewhere.records'),
    lambda fields: fields['shards'][0].update(name='/etc/passwd'),
    lambda fields: fields['shards'][0].update(name='..'),
    lambda fields: fields['shards'][0].update(name=3),
    lambda fields: fields['shards'][0].update(rows=-1),
    lambda fields: fields['shards'][0].update(rows='16'),
    lambda fields: fields['shards'][0].update(games=-1),
    lambda fields: fields['shards'][0].pop('checksum'),
    lambda fields: fields['shards'][0].update(sample='0'),
    lambda fields: fields['shards'].append(fields['shards'][0]),
    lambda fields: fields['shards'].append(None),
    lambda fields: fields.update(shards=[]),
    lambda fields: fields.update(shards=7),
    lambda fields: fields.pop('shards'),
    lambda fields: fields.update(version=2),
    lambda fields: fields.update(format='datatools.stft'),
    lambda fields: fields.update(config=[]),
    lambda fields: fields.update(config=dict(dtype=7, codec=dict(name='records', dtype=7))),
    lambda fields: fields['config']['codec'].pop('dtype'),
])
def test_an_edited_manifest_is_refused(tmp_path, change):
    small(tmp_path/'mine')
    edit_manifest(tmp_path/'mine', change)
    with pytest.raises(FormatError): ShardDirectory.open(tmp_path/'mine')


def test_a_manifest_that_was_edited_by_hand_or_cut(tmp_path):
    small(tmp_path/'mine')
    file = tmp_path/'mine/manifest.json'
    text = file.read_text()
    edit_manifest(tmp_path/'mine', lambda fields: fields['config']['codec'].update(name='chess'), rehash=False)
    with pytest.raises(FormatError, match='edited or damaged'): ShardDirectory.open(tmp_path/'mine')
    edit_manifest(tmp_path/'mine', lambda fields: None)
    with pytest.raises(UsageError, match='Import the module'): ShardDirectory.open(tmp_path/'mine')
    file.write_text(text[:len(text) // 2])
    with pytest.raises(FormatError, match='not a valid JSON'): ShardDirectory.open(tmp_path/'mine')
    file.write_text(text)
    with pytest.raises(MismatchError, match='dtype'): ShardDirectory.open(tmp_path/'mine', RecordCodec([('a', 'u1')]))


# --- Reading

def test_opening_opens_no_shard(tmp_path, monkeypatch):
    small(tmp_path/'mine')
    def refuse(*_): raise AssertionError('a shard was opened')
    monkeypatch.setattr(shards, 'ArrayFile', refuse)
    assert len(ShardDirectory.open(tmp_path/'mine')) == 40


def test_reading_a_range_is_the_same_as_mapping(tmp_path):
    directory, generator = small(tmp_path/'mine', 400, rows_per_shard=150), random.Random(1)
    for shard in directory.shards:
        shard, whole = pickle.loads(pickle.dumps(shard)), shard.records()
        for _ in range(50):
            start, stop = sorted(generator.choices(range(shard.rows + 1), k=2))
            assert np.array_equal(shard.read(start, stop), whole[start:stop])
        out = np.empty(7, DTYPE)
        assert shard.read(3, 10, out) is out and np.array_equal(out, whole[3:10])
        with pytest.raises(ValueError): whole['number'][0] = 1
        for wrong in [(-1, 2), (5, 3), (0, shard.rows + 1)]:
            with pytest.raises(UsageError, match='start, stop'): shard.read(*wrong)
        with pytest.raises(UsageError, match='out'): shard.read(0, 3, out)


def test_a_fingerprint_is_of_the_records_not_of_the_place(tmp_path):
    one, other, third = small(tmp_path/'one'), small(tmp_path/'other', source='elsewhere'), small(tmp_path/'third', 41)
    assert one.fingerprint == other.fingerprint != third.fingerprint


def test_many_shards_need_no_open_files(tmp_path):
    directory = small(tmp_path/'many', 200, rows_per_shard=5)
    used = len(os.listdir('/proc/self/fd'))
    for shard in directory.shards: shard.read(0, shard.rows)
    assert len(os.listdir('/proc/self/fd')) == used
    assert [shard.path.name for shard in directory.shards] == [f'shard_{number:04d}.records' for number in range(40)]


def test_more_than_9999_shards_stay_in_order(tmp_path):
    for name in ('shard_10000', 'shard_9999', 'shard_0002'): write_shard(tmp_path/f'{name}.records', some_records(1), codec=CODEC)
    assert [path.stem for path in shard_files(tmp_path)] == ['shard_0002', 'shard_9999', 'shard_10000']


# --- Transport

def test_transport_is_exact_and_damage_is_found(tmp_path):
    directory = small(tmp_path/'mine', 500)
    compress_directory(directory.path, tmp_path/'packed')
    assert content(decompress_directory(tmp_path/'packed', tmp_path/'out').path) == content(directory.path)
    with pytest.raises(UsageError, match='output'): decompress_directory(tmp_path/'packed', tmp_path/'out')
    with pytest.raises(UsageError, match='output'): compress_directory(directory.path, tmp_path/'packed')
    victim, generator = tmp_path/'packed/shard_0003.records.zst', random.Random(2)
    good = victim.read_bytes()
    def unpack(attempt):
        with pytest.raises(FormatError, match='shard_0003.records.zst is'): decompress_directory(tmp_path/'packed', tmp_path/f'out {attempt}')
        assert not (tmp_path/f'out {attempt}/shard_0003.records').exists() and not (tmp_path/f'out {attempt}/manifest.json').exists()
        assert not [*(tmp_path/f'out {attempt}').glob('.*')]
    found = 0
    for attempt in range(30):
        place = generator.randrange(len(good))
        victim.write_bytes(good[:place] + bytes([good[place] ^ (1 << generator.randrange(8))]) + good[place + 1:])
        try: unpacked = decompress_directory(tmp_path/'packed', tmp_path/f'out {attempt}')
        except FormatError: found += 1
        else: assert content(unpacked.path) == content(directory.path)  # a bit that means nothing
    assert found > 25
    for attempt, text in enumerate([b'', good[:50], good[:len(good) // 2], zstandard.compress(bytes(1 << 26)), zstandard.compress(b'other')]):
        victim.write_bytes(text)
        unpack(f'text {attempt}')
    victim.unlink()
    unpack('gone')


# --- Codecs

kinds = st.sampled_from(['u1', '<u2', '>u4', '<u8', 'i1', '<i8', '<f2', '<f4', '>f8', '?', 'S3', '<U2', '<M8[s]', '<c8', 'V2'])
leaf = st.tuples(kinds, st.lists(st.integers(1, 3), max_size=2))
nested = st.lists(leaf, min_size=1, max_size=3).map(lambda entries: [(f'g{i}', kind, tuple(shape)) for i, (kind, shape) in enumerate(entries)])
dtypes = st.lists(st.one_of(leaf, st.tuples(nested, st.lists(st.integers(1, 3), max_size=1))), min_size=1, max_size=4).map(
    lambda entries: np.dtype([(f'f{i}', kind, tuple(shape)) for i, (kind, shape) in enumerate(entries)]))


@settings(max_examples=200, deadline=None)
@given(dtype=dtypes, count=st.integers(0, 5), seed=st.integers(0, 99))
def test_any_dtype_survives_the_manifest_and_becomes_tensors(dtype, count, seed):
    fields = json.loads(json.dumps(dtype_to_json(dtype)))
    assert dtype_from_json(fields) == dtype
    codec = pickle.loads(pickle.dumps(codec_from_facts(RecordCodec(dtype).facts())))
    raw = np.random.default_rng(seed).integers(0, 128, count * dtype.itemsize, dtype=np.uint8) & 0b00111111
    records = np.frombuffer(raw.tobytes(), dtype, count)
    tensors = codec.decode(records)
    codec.check(records)
    def compare(prefix, values):
        if values.dtype.names:
            for name in values.dtype.names: compare(f'{prefix}.{name}' if prefix else name, values[name])
            return
        tensor = tensors.pop(prefix)
        assert isinstance(tensor, torch.Tensor) and tensor.shape[:values.ndim] == values.shape
        if values.dtype.kind in 'uifbc': assert np.array_equal(tensor.numpy(), values)
        if values.dtype.kind in 'mM': assert np.array_equal(tensor.numpy(), values.view('i8'))
    compare('', records)
    assert not tensors


def test_decoded_tensors_are_copies(tmp_path):
    records = some_records(4)
    tensors = CODEC.decode(records)
    records['value'] = -1
    assert tensors['value'].tolist() == pytest.approx([0, 1 / 7, 2 / 7, 3 / 7])
    decoded = CODEC.decode(small(tmp_path/'mine').shards[0].records())
    decoded['value'][0] = 5  # the map is read-only, its copy is not


def test_a_number_that_no_tensor_can_hold_is_an_error():
    with pytest.raises(FormatError, match='two fields of 4 bytes'): RecordCodec([('hash', '<u8')]).decode(np.array([(2**63,)], [('hash', '<u8')]))


@pytest.mark.parametrize('dtype', ['f4', [('a', object)], [('a', 'u1'), ('b', [('c', 'O')])], np.dtype([('a', 'u1'), ('b', '<f4')], align=True),
                                   dict(names=['a', 'b'], formats=['<u4', 'u1'], offsets=[0, 2]), dict(names=['a'], formats=['u1'], itemsize=8)])
def test_dtypes_that_make_no_files_are_refused(dtype):
    with pytest.raises(UsageError, match='dtype'): RecordCodec(dtype)


@pytest.mark.parametrize('fields', [7, 'f4', [], [['a']], [['a', 'x9']], [['a', 'u1', [-1]]], [['a', 'u1'], ['a', 'u1']], [[['t', 'a'], 'u1', 2, 3]], None, [['a', 'O']]])
def test_facts_that_describe_no_records_are_refused(fields):
    with pytest.raises((FormatError, UsageError)): codec_from_facts(dict(name='records', dtype=fields))
