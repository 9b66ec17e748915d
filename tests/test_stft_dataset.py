"""The dataset: every item under its number, from any process or thread, while the store grows, and one clear error for each kind of damage."""
import multiprocessing
import os
import pickle
import shutil
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils.data import DataLoader

from datatools.core import DatatoolsError, FormatError, UsageError, rng_for
from datatools.stft import dataset as dataset_module
from datatools.stft.dataset import PrecomputedSTFTDataset
from datatools.stft.records import encode_record
from datatools.stft.store import StoreWriter, item_offsets
from datatools.stft.transform import STFTConfig, pack, spectrum_view

COUNT = 37


def content(i, frames=4):
    "What item i holds"
    rng = rng_for(7, i)
    spectrum = torch.from_numpy((rng.standard_normal((2, 9, frames)) + 1j * rng.standard_normal((2, 9, frames))).astype(np.complex64))
    array, scale = pack(spectrum)
    return dict(stft_16=array, stft_16_scale=np.array(scale), audio=rng.standard_normal((2, 24)).astype(np.float32), class_id=np.int64(i))


def append(writer, indices, frames=lambda i: 4):
    for i in indices: writer.append(encode_record(i, content(i, frames(i)), {'label': f'größe {i}'}))


def write(path, count=COUNT, **options):
    with StoreWriter(path, {'window': 16}) as writer:
        append(writer, range(count), **options)
        writer.complete()
    return path


@pytest.fixture(scope='module')
def store(tmp_path_factory): return write(tmp_path_factory.mktemp('store') / 'train.lmdb')


def check(item, i):
    wanted = content(i)
    assert item.keys() == wanted.keys()
    for name, value in wanted.items():
        assert item[name].numpy().dtype == value.dtype and np.array_equal(item[name].numpy(), value), name


def check_all(path):
    with PrecomputedSTFTDataset(path) as dataset:
        for i in range(COUNT): check(dataset[i], i)
    return True


def test_items_by_number(store):
    with PrecomputedSTFTDataset(store) as dataset:
        assert len(dataset) == COUNT
        for i in range(-COUNT, COUNT): check(dataset[i], i % COUNT)
        for i in (np.int32(5), np.uint8(5), torch.tensor(5)): check(dataset[i], 5)
        for wrong in (COUNT, -COUNT - 1, 1 << 70):
            with pytest.raises(IndexError, match='has 37 items'): dataset[wrong]
        for wrong in (1.0, '1', None, slice(2)):
            with pytest.raises(TypeError): dataset[wrong]
        assert dataset.metadata(-1) == {'index': COUNT - 1, 'label': 'größe 36'}
        assert [int(item['class_id']) for item in dataset] == list(range(COUNT))
        item = dataset[0]
        for tensor in item.values(): tensor.zero_()
        check(dataset[0], 0)


@pytest.mark.parametrize('name', ['.', 'data.mdb'])
def test_any_name_of_the_store(store, name): assert check_all(store / name) and check_all(str(store / name))


def test_opens_fast(store):
    def once():
        begin = time.perf_counter()
        with PrecomputedSTFTDataset(store) as dataset: len(dataset)
        return time.perf_counter() - begin
    assert min(once() for _ in range(50)) < 0.0015  # measured below 0.0005 on a quiet machine


@pytest.mark.parametrize('view', ['complex', 'magnitude', 'magnitude_phase'])
def test_views(store, view):
    with PrecomputedSTFTDataset(store, view=view) as dataset, PrecomputedSTFTDataset(store, ['stft_16'], view=view) as one:
        array, scale = content(3)['stft_16'], content(3)['stft_16_scale']
        wanted = spectrum_view(torch.view_as_complex(torch.from_numpy(array.astype(np.float32) * scale)), view)
        assert list(dataset[3]) == ['stft_16', 'audio', 'class_id'] and list(one[3]) == ['stft_16']
        assert torch.allclose(dataset[3]['stft_16'], wanted) and torch.equal(one[3]['stft_16'], dataset[3]['stft_16'])
        arrays = {'stft_16': np.empty((2, *wanted.shape), wanted.numpy().dtype)}
        one.read_into([9, 3], arrays)
        assert np.array_equal(arrays['stft_16'][1], one[3]['stft_16'].numpy())


def test_fields_and_transform(store):
    with PrecomputedSTFTDataset(store, 'class_id', lambda item: {'double': 2 * item['class_id']}) as dataset:
        assert dataset[4] == {'double': 8}
    for wrong in (dict(fields=['stft_15']), dict(view='power'), dict(fields=['stft_16_scale'], view='complex')):
        with pytest.raises(UsageError, match='one of'): PrecomputedSTFTDataset(store, **wrong)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(-COUNT, COUNT - 1), max_size=9))
def test_into_a_buffer(store, indices):
    with PrecomputedSTFTDataset(store) as dataset:
        arrays = {name: np.empty((len(indices), *value.shape), value.dtype) for name, value in content(0).items()}
        dataset.read_into(indices, arrays)
        for row, i in enumerate(indices): check({name: torch.from_numpy(array[row:row + 1]).squeeze(0) for name, array in arrays.items()}, i % COUNT)
        for item, i in zip(dataset.__getitems__(indices), indices): check(item, i % COUNT)


def test_items_of_several_shapes(tmp_path):
    with PrecomputedSTFTDataset(write(tmp_path / 'a', 4, frames=lambda i: 4 + i)) as dataset:
        assert [dataset[i]['stft_16'].shape[2] for i in range(4)] == [4, 5, 6, 7]
        with pytest.raises(UsageError, match='collate_fn'): dataset.read_into([0, 1], {n: np.empty((2, *v.shape), v.dtype) for n, v in content(0).items()})


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_processes(store, method):
    with PrecomputedSTFTDataset(store) as dataset:
        check(dataset[0], 0)  # open before the fork
        loader = DataLoader(dataset, 5, num_workers=2, multiprocessing_context=method)
        assert torch.equal(torch.cat([batch['class_id'] for batch in loader]), torch.arange(COUNT))
        with multiprocessing.get_context(method).Pool(1) as pool: assert pool.apply(check_all, (store,))
        check(dataset[1], 1)
        check(pickle.loads(pickle.dumps(dataset))[2], 2)


def test_threads_and_two_on_one_path(store):
    datasets, failures = [PrecomputedSTFTDataset(store), PrecomputedSTFTDataset(store / 'data.mdb')], []
    def read(seed):
        try:
            for i in rng_for(seed).integers(COUNT, size=60): check(datasets[int(i) % 2][int(i)], int(i))
        except BaseException as error: failures.append(error)
    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    datasets[0].close()
    check(datasets[1][5], 5)
    check(datasets[0][6], 6)  # opens again
    for dataset in datasets: dataset.close()
    assert not failures


def test_closed_leaves_nothing_open(store):
    before = len(os.listdir('/proc/self/fd'))
    for _ in range(3):
        with PrecomputedSTFTDataset(store) as dataset:
            dataset[0]
            dataset.advise([0, 1])
    assert len(os.listdir('/proc/self/fd')) == before


def _grow(path):
    with StoreWriter(path, {'window': 16}, resume=True) as writer: append(writer, range(writer.count, 3000))


def test_reader_survives_a_growing_map(tmp_path):
    path = tmp_path / 'growing'
    with StoreWriter(path, {'window': 16}, map_size=1 << 20) as writer: append(writer, range(COUNT))
    with PrecomputedSTFTDataset(path) as dataset:
        check(dataset[0], 0)
        process = multiprocessing.get_context('spawn').Process(target=_grow, args=(path,))
        process.start()
        while process.is_alive(): check(dataset[COUNT - 1], COUNT - 1)
        process.join()
        assert process.exitcode == 0 and len(dataset) == COUNT
        with PrecomputedSTFTDataset(path) as later: assert len(later) == 3000 and int(later[-1]['class_id']) == 2999
        check(dataset[3], 3)


def test_deleted_under_a_reader(store, tmp_path):
    copy = shutil.copytree(store, tmp_path / 'copy')
    dataset = PrecomputedSTFTDataset(copy)
    check(dataset[0], 0)
    shutil.rmtree(copy)
    check(dataset[1], 1)  # the map holds the file
    other = pickle.loads(pickle.dumps(dataset))
    dataset.close()
    with pytest.raises((DatatoolsError, OSError), match='copy'): other[0]


def damaged(path, kind):
    data = path / 'data.mdb'
    if kind == 'truncated': os.truncate(data, os.path.getsize(data) // 2 // 4096 * 4096)
    if kind == 'garbage': data.write_bytes(os.urandom(1 << 16))
    if kind == 'empty': data.write_bytes(b'')
    if kind == 'missing': data.unlink()


@pytest.mark.parametrize('kind', ['truncated', 'garbage', 'empty', 'missing'])
def test_damage(store, tmp_path, kind):
    copy = shutil.copytree(store, tmp_path / 'copy')
    damaged(copy, kind)
    with pytest.raises((DatatoolsError, OSError), match='copy'): PrecomputedSTFTDataset(copy)


def test_damaged_record(store, tmp_path):
    copy = shutil.copytree(store, tmp_path / 'copy')
    data = bytearray((copy / 'data.mdb').read_bytes())
    places, at = [], data.find(b'DTRECORD')
    while at >= 0: places, at = [*places, at], data.find(b'DTRECORD', at + 1)
    target = next(place for place in places if int.from_bytes(data[place + 24:place + 32], 'little') == 5)
    data[target + 16] ^= 1  # hash of the schema
    (copy / 'data.mdb').write_bytes(data)
    with PrecomputedSTFTDataset(copy) as dataset:
        check(dataset[4], 4)
        with pytest.raises(FormatError, match='item 5'): dataset[5]
        with pytest.raises(FormatError, match='item 5'): dataset.read_into([4, 5], {'class_id': np.empty(2, np.int64)})


def test_advice_names_the_bytes_of_the_items(store, monkeypatch):
    "What is not in memory is asked for, to the last byte and nothing else; what is in memory is not"
    calls, (offsets, lengths) = [], item_offsets(store)
    with PrecomputedSTFTDataset(store) as dataset:
        dataset.advise([0])  # which reads where the items lie
        monkeypatch.setattr(os, 'posix_fadvise', lambda file, offset, length, advice: calls.append((offset, length, advice)))
        monkeypatch.setattr(dataset_module, '_in_memory', lambda file, offset: False)
        dataset.advise([])
        assert not calls
        dataset.advise([3, 1])
        assert {advice for *_, advice in calls} == {os.POSIX_FADV_WILLNEED}
        named = {byte for offset, length, _ in calls for byte in range(offset, offset + length)}
        assert named == {byte for item in (3, 1) for byte in range(offsets[item], offsets[item] + lengths[item])}
        calls.clear()
        monkeypatch.setattr(dataset_module, '_in_memory', lambda file, offset: True)
        dataset.advise(list(range(COUNT)))
        assert not calls
        check(dataset[3], 3)


def test_a_store_that_is_not_complete(tmp_path):
    with StoreWriter(tmp_path/'store', {}) as writer: append(writer, range(3))
    with pytest.warns(UserWarning, match='is not complete.*the first 3 items'): dataset = PrecomputedSTFTDataset(tmp_path/'store')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        check(pickle.loads(pickle.dumps(dataset))[2], 2)  # once is enough
    dataset.close()


@pytest.mark.parametrize('config', [['a list'], dict(items='mine', view=3), 'text', None, dict(stft=3)], ids=str)
def test_the_configuration_of_someone_else(tmp_path, config):
    with StoreWriter(tmp_path/'store', config) as writer:
        append(writer, range(2))
        writer.complete()
    with PrecomputedSTFTDataset(tmp_path/'store') as dataset:
        assert '<td>items</td><td>2</td>' in dataset._repr_html_()
        with pytest.raises(UsageError, match='was not made by precompute'): dataset.config


def test_the_configuration(tmp_path):
    config = STFTConfig(8000, (256, 512), 64, 2, .5)
    for number, stored in enumerate((config.as_dict(), dict(stft=config.as_dict(), files=3))):
        with StoreWriter(tmp_path/f'{number}', stored) as writer: writer.complete()
        with PrecomputedSTFTDataset(tmp_path/f'{number}') as dataset: assert dataset.config == config


def test_shown(store):
    with PrecomputedSTFTDataset(store, ['audio']) as dataset:
        assert 'audio' in repr(dataset) and '37 items' in repr(dataset)
        shown = dataset._repr_html_()
        assert 'stft_16_scale' in shown and '2 × 9 × 4 × 2' in shown and 'yes' in shown
