"""The reader: every sample under its number whatever is missing, from any process or thread, at the speed of h5py or better."""
import json
import multiprocessing
import os
import pickle
import shutil
import threading
import time
from collections import Counter

import h5py
import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader

from datatools.core import FormatError, Manifest, UsageError, config_hash, rng_for
from datatools.vst import reader as reader_module
from datatools.vst.chunks import COMPRESSIONS, FILE_NAMING, FORMAT, VERSION, ChunkLayout, PartialChunk
from datatools.vst.reader import FIELDS, ChunkedDatasetReader, header_problem

TOTAL, EACH, FRAMES = 23, 5, 200  # four chunks of five samples, one of three


def content(i):
    "What sample i holds"
    rng = rng_for(5, i)
    return dict(audio=rng.uniform(-1, 1, (2, FRAMES)).astype(np.float32), mel=rng.uniform(-80, 0, (2, 128, 3)).astype(np.float32),
                param_array=rng.random(4, np.float32), midi_note=30 + i, velocity=100, note_start_end=(0.0, 0.1 + i), loudness=-1.0 - i, attempt=i % 3,
                rejections=(i % 3, 0, 0, 0, 0), phrase=i % 4 - 1)


def config_of(total=TOTAL, naming=FILE_NAMING, **more): return dict(num_samples=total, samples_per_file=EACH, file_naming=naming, **more)


def write_chunk(folder, chunk, total=TOTAL, each=EACH, compression='none', naming=FILE_NAMING):
    samples = min(each, total - chunk * each)
    layout = ChunkLayout(samples, 2, FRAMES, (2, 128, 3), 4, first=chunk * each, chunk=chunk, sample_rate=8000, duration_seconds=FRAMES / 8000, param_set='test')
    partial = PartialChunk.create(folder / (naming.format(chunk=chunk) + '.partial'), layout, config_hash(config_of(total, naming)))
    for row in range(samples): partial.write(row, **content(layout.first + row))
    return partial.finish(folder / naming.format(chunk=chunk), lambda vector, row: json.dumps({'größe': float(vector[0])}, ensure_ascii=False), compression)


def write_manifest(folder, complete=True, total=TOTAL, naming=FILE_NAMING):
    Manifest.create(folder, FORMAT, VERSION, config_of(total, naming)).update(complete=complete)


@pytest.fixture(scope='module')
def dataset(tmp_path_factory):
    "A complete dataset with a manifest; not to be changed"
    folder = tmp_path_factory.mktemp('dataset')
    for chunk in range(5): write_chunk(folder, chunk)
    write_manifest(folder)
    return folder


@pytest.fixture
def copy(dataset, tmp_path): return shutil.copytree(dataset, tmp_path / 'copy')


def check_sample(sample, i):
    "Is it sample i, in every field?"
    wanted = content(i)
    assert sample['global_id'] == i and sample['chunk_id'] == i // EACH and sample['sample_rate'] == 8000
    assert sample['audio'].dtype == np.float16 and (sample['audio'] == wanted['audio'].astype(np.float16)).all()
    assert (sample['mel_spec'] == wanted['mel']).all() and (sample['param_array'] == wanted['param_array']).all()
    assert sample['parameters'] == {'größe': float(wanted['param_array'][0])}
    for name in ('midi_note', 'velocity', 'loudness', 'attempt', 'phrase'): assert sample[name] == wanted[name]
    for name in ('note_start_end', 'rejections'): assert tuple(sample[name]) == wanted[name]


@pytest.mark.parametrize('compression', COMPRESSIONS)
def test_every_sample_with_and_without_a_manifest(tmp_path, compression):
    for chunk in range(5): write_chunk(tmp_path, chunk, compression=compression)
    for _ in range(2):
        with ChunkedDatasetReader(tmp_path, handles=2) as reader:
            assert len(reader) == reader.total_samples == TOTAL
            for i in np.random.default_rng(0).permutation(TOTAL): check_sample(reader[int(i)], i)
            assert not any(reader.validate().values())
            assert reader.get_dataset_info()['complete']
        if not (tmp_path / 'manifest.json').exists(): write_manifest(tmp_path)


def test_numbers_and_slices(dataset):
    reader = ChunkedDatasetReader(dataset)
    check_sample(reader[-1], 22)
    check_sample(reader[-23], 0)
    check_sample(reader[np.int64(7)], 7)
    assert [sample['global_id'] for sample in reader[20:]] == [20, 21, 22] and len(list(reader)) == TOTAL
    for wrong in (23, -24, 10**12):
        with pytest.raises(IndexError, match='23'): reader[wrong]
    for wrong in (1.5, '1', None, True):
        with pytest.raises(UsageError, match='integer'): reader[wrong]


def test_samples_are_copies(dataset):
    reader = ChunkedDatasetReader(dataset)
    for value in reader[3].values():
        if isinstance(value, np.ndarray): value[...] = 0
    check_sample(reader[3], 3)


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 40), st.integers(-2**70, 2**70))
def test_random_samples(dataset, n, seed):
    reader = ChunkedDatasetReader(dataset)
    ids = [sample['global_id'] for sample in reader.get_random_samples(n, seed=seed, fields=())]
    assert ids == [sample['global_id'] for sample in reader.get_random_samples(n, seed, fields=())]
    assert len(ids) == n and (n > TOTAL or len(set(ids)) == n) and all(0 <= i < TOTAL for i in ids)


def test_random_samples_are_uniform_also_with_chunks_missing(copy):
    (copy / 'dataset_0002.h5').unlink()
    reader = ChunkedDatasetReader(copy)
    counts = Counter(sample['global_id'] for seed in range(1500) for sample in reader.get_random_samples(6, seed, fields=()))
    assert set(counts) == {*range(10), *range(15, 23)}
    assert max(abs(count - 500) for count in counts.values()) < 5 * 500**0.5
    for sample in reader.get_random_samples(5, seed=3): check_sample(sample, sample['global_id'])
    for wrong in (-1, 1.5, True):
        with pytest.raises(UsageError, match='n='): reader.get_random_samples(wrong)


def spoil(folder, chunk, how):
    "Do something to a chunk, and say what its state is then"
    path = folder / FILE_NAMING.format(chunk=chunk)
    if how == 'missing': path.unlink()
    if how == 'partial': path.rename(path.with_name(path.name + '.partial'))
    if how == 'empty': path.write_bytes(b'')
    if how == 'text': path.write_text('Not a chunk.' * 100)
    if how == 'cut': os.truncate(path, path.stat().st_size - 1)
    return how if how in ('missing', 'partial') else 'damaged'


@pytest.mark.parametrize('how', ['missing', 'partial', 'empty', 'text', 'cut'])
@pytest.mark.parametrize('manifest', [True, False])
@pytest.mark.parametrize('chunk', [0, 2, 4])
def test_one_chunk_is_not_there_the_rest_is(copy, how, manifest, chunk):
    state, name = spoil(copy, chunk, how), FILE_NAMING.format(chunk=chunk)
    if not manifest: (copy / 'manifest.json').unlink()
    reader = ChunkedDatasetReader(copy)
    info = reader.get_dataset_info()
    gone = range(chunk * EACH, min(chunk * EACH + EACH, TOTAL))
    if not manifest and chunk == 4 and how == 'missing': assert len(reader) == 20 and info['complete']  # nobody can know of it
    else:
        assert [entry.removesuffix('.partial') for entry in info[state]] == [name] and sum(len(info[s]) for s in ('missing', 'partial', 'damaged')) == 1
        assert not info['complete'] and name in str(reader._repr_html_())
        with pytest.raises(FormatError, match=name): reader[gone[0]]
        assert [bool(problems) for problems in reader.validate().values()] == [k == chunk for k in range(5)]
    left = [i for i in range(TOTAL) if i not in gone]
    for i in left: check_sample(reader[i], i)
    assert [sample['global_id'] for sample in reader] == left and reader.total_samples == len(left)
    assert sum(len(file['audio'][:]) for file in reader.iterate_chunks()) == len(left)
    assert [note for *_, note in reader.torch(fields=('audio', 'midi_note'))] == [30 + i for i in left]


def test_final_file_counts_where_a_partial_is_left(copy):
    shutil.copy(copy / 'dataset_0001.h5', copy / 'dataset_0001.h5.partial')
    for _ in range(2):
        assert ChunkedDatasetReader(copy).get_dataset_info()['partial'] == []
        (copy / 'manifest.json').unlink(missing_ok=True)


def test_nothing_finished_yet(copy):
    for chunk in range(5): spoil(copy, chunk, 'partial')
    reader = ChunkedDatasetReader(copy)
    assert (len(reader), reader.total_samples, list(reader.iterate_chunks())) == (23, 0, [])
    with pytest.raises(UsageError, match='no finished chunk'): reader.get_random_samples(1)
    for chunk in range(5): (copy / (FILE_NAMING.format(chunk=chunk) + '.partial')).unlink()
    with pytest.raises(FormatError, match='no chunk can be read'): ChunkedDatasetReader(copy)
    with pytest.raises(FileNotFoundError, match='nowhere'): ChunkedDatasetReader(copy / 'nowhere')


def test_a_chunk_that_does_not_belong_is_named(copy):
    shutil.copy(copy / 'dataset_0001.h5', copy / 'dataset_0003.h5')
    reader = ChunkedDatasetReader(copy)
    for _ in range(2):
        with pytest.raises(FormatError, match='dataset_0003.h5 is damaged: does not belong here: chunk is 1, not 3, first is 5, not 15.*samples are 15 … 19'): reader[16]
    assert 'does not belong' in reader.validate()['dataset_0003.h5'][0]


def test_a_chunk_of_another_data_set_is_named_and_left_out(copy):
    for chunk, left in ((3, [*range(15), 20, 21, 22]), (0, [*range(5, 15), 20, 21, 22])):
        path = copy / FILE_NAMING.format(chunk=chunk)
        with h5py.File(path, 'r+') as file: file.attrs['config_hash'] = 'another'
        for deep in (True, False):
            with ChunkedDatasetReader(copy) as reader:
                assert reader.validate(deep=deep)[path.name] == [f'belongs to another data set: its config_hash is another, not {config_hash(config_of())[:12]}']
                assert path.name in reader.get_dataset_info()['damaged'] and not reader.get_dataset_info()['complete']
        with ChunkedDatasetReader(copy) as reader:
            with pytest.raises(FormatError, match=f'{path.name} is damaged: belongs to another data set'): reader[chunk * EACH]
            assert [sample['global_id'] for sample in reader] == left
    (copy / 'manifest.json').unlink()
    assert len(list(ChunkedDatasetReader(copy))) == TOTAL  # nobody can know of it


def damage_metadata(path):
    "The superblock stays whole, what follows does not"
    content = path.read_bytes()
    path.write_bytes(content[:60] + bytes(400) + content[460:])


@pytest.mark.parametrize('manifest', [True, False])
def test_chunks_with_damaged_metadata_are_left_out(copy, manifest):
    for chunk in (0, 2): damage_metadata(copy / FILE_NAMING.format(chunk=chunk))
    if not manifest: (copy / 'manifest.json').unlink()
    left, gone = [*range(5, 10), *range(15, 23)], ['dataset_0000.h5', 'dataset_0002.h5']

    def check(look):
        with ChunkedDatasetReader(copy) as reader:
            look(reader)
            assert reader.get_dataset_info()['damaged'] == gone and reader.total_samples == len(left)
            for i in left: check_sample(reader[i], i)
            for i in (4, 10):
                with pytest.raises(FormatError, match=f'{gone[i // 10]} is damaged: .*samples are {i // 5 * 5} … {i // 5 * 5 + 4}'): reader[i]
            assert pickle.loads(pickle.dumps(reader)).total_samples == len(left)

    def iterate(reader): assert [sample['global_id'] for sample in reader] == left
    def chunk_by_chunk(reader): assert [file.attrs['chunk_id'] for file in reader.iterate_chunks()] == [1, 3, 4]

    def draw(reader):
        ids = [sample['global_id'] for sample in reader.get_random_samples(13, seed=3, fields=())]
        assert sorted(ids) == left and ids == [sample['global_id'] for sample in reader.get_random_samples(13, seed=3, fields=())]

    def batches(reader):
        if manifest:
            with pytest.raises(FormatError, match='dataset_0002.h5 is damaged'): list(reader.torch(fields='midi_note'))
        reader.validate(deep=False)
        assert [note for note, in reader.torch(fields='midi_note')] == [30 + i for i in left]
    for look in (iterate, chunk_by_chunk, draw, batches): check(look)
    assert [bool(problems) for problems in ChunkedDatasetReader(copy).validate().values()] == [True, False, True, False, False]


def test_phrases_are_named(tmp_path):
    write_chunk(tmp_path, 0)
    assert ChunkedDatasetReader(tmp_path).phrases == []
    for phrases in (['a.mid', 'b/a.mid'], [['a.mid', '0123'], ['b/a.mid', '4567']]):
        Manifest.create(tmp_path, FORMAT, VERSION, config_of(phrases=phrases))
        with pytest.raises(FormatError, match='belongs to another'): ChunkedDatasetReader(tmp_path)
        with h5py.File(tmp_path / 'dataset_0000.h5', 'r+') as file: file.attrs['config_hash'] = config_hash(config_of(phrases=phrases))
        with ChunkedDatasetReader(tmp_path) as reader:
            assert reader.phrases == ['a.mid', 'b/a.mid'] and [reader[i]['phrase'] for i in range(4)] == [-1, 0, 1, 2]
        (tmp_path / 'manifest.json').unlink()


def test_info_says_how_it_was_made(tmp_path):
    config = config_of(seed=7, isolation='fork', compression='gzip', instrument=dict(name='Synth', version='1.2', sha256=None))
    write_chunk(tmp_path, 0)
    Manifest.create(tmp_path, FORMAT, VERSION, config)
    with h5py.File(tmp_path / 'dataset_0000.h5', 'r+') as file: file.attrs['config_hash'] = config_hash(config)
    assert dict(seed=7, isolation='fork', compression='gzip', plugin='Synth 1.2').items() <= ChunkedDatasetReader(tmp_path).get_dataset_info().items()


def test_bits_flipped_in_the_data_are_found_by_validate(copy):
    path = copy / 'dataset_0001.h5'
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(content(7)['audio'].astype(np.float16).tobytes()) + 11] ^= 64
    path.write_bytes(damaged)
    report = ChunkedDatasetReader(copy).validate()
    assert report['dataset_0001.h5'] == ['sample 2: its data do not match its checksum'] and sum(map(bool, report.values())) == 1
    assert not any(ChunkedDatasetReader(copy).validate(deep=False).values())


@pytest.mark.parametrize('blosc', [False, True])
def test_files_of_other_programs(tmp_path, blosc):
    "Six datasets, attributes on audio only, no manifest, any chunk shape"
    import hdf5plugin
    for chunk in range(2):
        with h5py.File(tmp_path / f'dataset_{chunk:04d}.h5', 'w') as file:
            n = 4 - chunk
            file.create_dataset('audio', data=np.full((n, 1, 50), chunk, np.float16), **(hdf5plugin.Blosc2() if blosc else dict(chunks=(2, 1, 50))))
            file['mel_spec'], file['param_array'] = np.zeros((n, 1, 128, 2), '>f4'), np.zeros((n, 3), np.float32)
            file['parameters'], file['midi_notes'], file['velocities'] = ['{"a": 1}'] * n, np.arange(n, dtype=np.int16), np.zeros(n, np.int16)
            file['audio'].attrs.update(velocity=100, signal_duration_seconds=0.1, sample_rate=500.0, min_loudness=-55.0)
            file.attrs['chunk_id'] = chunk
    reader = ChunkedDatasetReader(tmp_path)
    assert len(reader) == 7 and reader.fields == ('audio', 'mel_spec', 'param_array', 'parameters', 'midi_note', 'velocity')
    assert reader[6]['midi_note'] == 2 and reader[6]['parameters'] == {'a': 1} and (reader[6]['audio'] == 1).all() and reader[0]['mel_spec'].sum() == 0
    assert not any(reader.validate().values())
    with pytest.raises(UsageError, match='loudness'): reader.get_sample(0, fields=('loudness',))


def test_one_file_and_other_names(tmp_path):
    path = write_chunk(tmp_path, 0)
    assert [sample['midi_note'] for sample in ChunkedDatasetReader(path)] == [30, 31, 32, 33, 34]
    path.rename(tmp_path / 'dataset.h5')
    assert len(ChunkedDatasetReader(tmp_path)) == 5
    folder = tmp_path / 'named'
    folder.mkdir()
    for chunk in range(3): write_chunk(folder, chunk, total=13, naming='pad.{chunk}+.h5')
    write_manifest(folder, total=13, naming='pad.{chunk}+.h5')
    assert [sample['midi_note'] for sample in ChunkedDatasetReader(folder)] == [30 + i for i in range(13)]


@pytest.mark.parametrize('config', [dict(num_samples=3), dict(num_samples='x', samples_per_file=5, file_naming=FILE_NAMING), [],
                                    dict(num_samples=5, samples_per_file=0, file_naming=FILE_NAMING), dict(num_samples=5, samples_per_file=5, file_naming='dataset.h5')])
def test_a_manifest_that_is_not_one(tmp_path, config):
    write_chunk(tmp_path, 0)
    Manifest.create(tmp_path, FORMAT, VERSION, config)
    with pytest.raises(FormatError, match='manifest.json'): ChunkedDatasetReader(tmp_path)


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_torch_batches_from_worker_processes(dataset, method):
    reader = ChunkedDatasetReader(dataset, handles=2)
    check_sample(reader[0], 0)  # files are open when the workers fork
    view = reader.torch(fields=('audio', 'param_array', 'midi_note', 'parameters'))
    for persistent in (True, False):
        loader = DataLoader(view, batch_size=4, num_workers=2, shuffle=True, multiprocessing_context=method, persistent_workers=persistent)
        for _ in range(2):
            seen = []
            for audio, param_array, notes, parameters in loader:
                seen += notes.tolist()
                for k, note in enumerate(notes.tolist()):
                    assert (audio[k].numpy() == content(note - 30)['audio'].astype(np.float16)).all()
                    assert (param_array[k].numpy() == content(note - 30)['param_array']).all() and parameters['größe'][k] == param_array[k][0]
            assert sorted(seen) == list(range(30, 53))
        if method == 'spawn': break
    check_sample(reader[22], 22)


def test_torch_view(dataset):
    view = ChunkedDatasetReader(dataset).torch(fields='midi_note', transform=lambda item: -item[0])
    assert len(view) == TOTAL and view[0] == -30 and view[-1] == -52 and view.__getitems__([3, 1, 3]) == [-33, -31, -33]
    for wrong in (TOTAL, -TOTAL - 1):
        with pytest.raises(IndexError, match='23'): view[wrong]
    with pytest.raises(UsageError, match='fields'): ChunkedDatasetReader(dataset).torch(fields=('sound',))


def test_a_fork_opens_its_own_files(dataset):
    reader = ChunkedDatasetReader(dataset)
    check_sample(reader[0], 0)
    inherited = reader._open(0)

    def child(queue):
        check_sample(reader[0], 0)
        queue.put((reader._process == os.getpid(), reader._open(0) is inherited))
    context = multiprocessing.get_context('fork')
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    assert queue.get(timeout=30) == (True, False)
    process.join()
    assert reader._open(0) is inherited


def test_files_are_kept_open_up_to_the_limit_and_closed(dataset):
    def open_files(): return sum(os.readlink(f'/proc/self/fd/{fd}').startswith(str(dataset)) for fd in os.listdir('/proc/self/fd') if os.path.exists(f'/proc/self/fd/{fd}'))
    before = open_files()
    reader = ChunkedDatasetReader(dataset, handles=3)
    assert open_files() == before
    for i in range(TOTAL): reader[i]
    assert open_files() - before == 3
    copied = pickle.loads(pickle.dumps(reader))
    check_sample(copied[3], 3)
    reader.close(), copied.close()
    assert open_files() == before
    check_sample(reader[3], 3)


def test_threads_share_a_reader(dataset):
    reader, wrong = ChunkedDatasetReader(dataset, handles=1), []

    def work(seed):
        try:
            for i in np.random.default_rng(seed).integers(TOTAL, size=150): check_sample(reader[int(i)], i)
        except BaseException as error: wrong.append(error)  # noqa: BLE001  to be seen by the test
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert wrong == []


def test_ten_thousand_chunks_open_quickly(tmp_path, monkeypatch):
    first = write_chunk(tmp_path, 0, total=50_000)
    for chunk in range(1, 10_000): os.link(first, tmp_path / FILE_NAMING.format(chunk=chunk))
    write_manifest(tmp_path, total=50_000)
    opened = []
    monkeypatch.setattr(reader_module, 'open_chunk', lambda path, real=reader_module.open_chunk: opened.append(path) or real(path))
    start = time.process_time()
    reader = ChunkedDatasetReader(tmp_path)
    info = reader.get_dataset_info()
    assert (info['total_samples'], info['num_chunks'], len(opened)) == (50_000, 10_000, 1)
    assert time.process_time() - start < 3
    assert len(pickle.dumps(reader)) < 2_000_000


def test_old_and_new_superblocks_say_where_they_end(tmp_path):
    for version in ('earliest', 'v108', 'v110', 'v112'):
        path = tmp_path / f'{version}.h5'
        with h5py.File(path, 'w', libver=('earliest', 'v108') if version == 'earliest' else (version, 'latest')) as file: file['x'] = np.arange(1000)
        assert header_problem(path) == ''
        os.truncate(path, path.stat().st_size - 1)
        assert 'cut short' in header_problem(path)
        head = path.read_bytes()[:48]
        for byte in (8, *range(10, 48)) if head[8] >= 2 else ():  # byte 9, the width of offsets, is left to HDF5
            path.write_bytes(head[:byte] + bytes([head[byte] ^ 1]) + head[byte + 1:])
            assert header_problem(path), f'byte {byte} of version {head[8]}'


def test_fields(dataset):
    reader = ChunkedDatasetReader(dataset)
    assert reader.fields == FIELDS
    for field in FIELDS: assert list(reader.get_sample(1, fields=(field,))) == ['global_id', 'chunk_id', field, 'sample_rate']
    info = reader.get_dataset_info()
    assert dict(total_samples=23, num_chunks=5, samples_per_file=5, sample_rate=8000, channels=2, num_params=4, param_set='test', complete=True).items() <= info.items()
    assert info['total_bytes'] == sum(path.stat().st_size for path in dataset.glob('*.h5'))
    json.dumps(info)
