"""The loader: the same batches in the same order from any number of workers, never changed under their holder, nothing left behind."""
import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
import warnings

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given, settings, strategies as st

from datatools.core import DatatoolsError, FormatError, MismatchError, UsageError
from datatools.stft.dataset import PrecomputedSTFTDataset
from datatools.loader import Loader, _available_bytes, epoch_order, make_loader
from datatools.stft.records import encode_record
from datatools.stft.store import StoreWriter

COUNT = 103
WAYS = [(0, None), (1, 'fork'), (2, 'fork'), (2, 'spawn')]


@pytest.fixture(scope='module')
def store(tmp_path_factory):
    path = tmp_path_factory.mktemp('store') / 'train.lmdb'
    with StoreWriter(path, {}) as writer:
        for i in range(COUNT):
            fields = {'wave': np.full((3, 5), i, np.float16), 'number': np.int64(i), 'large': np.full(5000, i, np.int32)}
            writer.append(encode_record(i, fields, {'name': f'item {i}'}))
        writer.complete()
    return path


@pytest.fixture
def dataset(store):
    with PrecomputedSTFTDataset(store) as dataset: yield dataset


@pytest.fixture(autouse=True)
def nothing_left():
    "No shared memory and no process remains after a test"
    before, children = shared(), {child.pid for child in psutil.Process().children()}
    yield
    until = time.time() + 5
    while {child.pid for child in workers_of(os.getpid())} - children and time.time() < until: time.sleep(0.02)
    assert shared() <= before
    assert not {child.pid for child in workers_of(os.getpid())} - children


def shared(): return {name for name in os.listdir('/dev/shm') if name.startswith(('torch_', 'psm_', 'datatools'))}


def workers_of(pid):
    "Child processes but for the helpers that multiprocessing keeps until the end"
    found = []
    for child in psutil.Process(pid).children():
        try:
            if child.status() != psutil.STATUS_ZOMBIE and 'tracker' not in ' '.join(child.cmdline()): found.append(child)
        except psutil.Error: pass
    return found


def numbers(batch):
    "The items of a batch, every byte checked"
    found = batch['number'].tolist()
    assert torch.equal(batch['wave'], torch.tensor(found, dtype=torch.float16)[:, None, None].expand(-1, 3, 5))
    assert torch.equal(batch['large'], torch.tensor(found, dtype=torch.int32)[:, None].expand(-1, 5000))
    return found


@pytest.mark.parametrize('workers,method', WAYS)
def test_same_batches_any_way(dataset, workers, method):
    wanted = [epoch_order(COUNT, epoch, True, 3)[at:at + 8].tolist() for epoch in range(2) for at in range(0, COUNT, 8)]
    with make_loader(dataset, 8, workers, shuffle=True, seed=3, start_method=method) as loader:
        assert len(loader) == 13
        assert [numbers(batch) for _ in range(2) for batch in loader] == wanted
    with make_loader(dataset, 8, workers, drop_last=True, start_method=method, metadata=True) as loader:
        batches = [(numbers(batch), batch['metadata']) for batch in loader]
        assert len(batches) == len(loader) == 12 and sum((found for found, _ in batches), []) == list(range(96))
        assert batches[2][1][1] == {'index': 17, 'name': 'item 17'}


@pytest.mark.parametrize('workers,method', WAYS)
def test_no_batch_changes_under_its_holder(dataset, workers, method):
    rng, held, seen = random.Random(4), [], []
    with make_loader(dataset, 4, workers, shuffle=True, start_method=method) as loader, warnings.catch_warnings():
        warnings.simplefilter('ignore')
        for _ in range(3):
            for batch in loader:
                kept = {name: tensor[1:] for name, tensor in batch.items()}  # views keep a batch, too
                held.append((kept, numbers(batch)[1:]))
                seen += numbers(batch)
                if rng.random() < 0.3: time.sleep(rng.random() * 0.01)
                while len(held) > rng.randrange(12):
                    kept, wanted = held.pop(rng.randrange(len(held)))
                    assert numbers(kept) == wanted
        for kept, wanted in held: assert numbers(kept) == wanted
    for kept, wanted in held: assert numbers(kept) == wanted  # after the loader is closed
    assert sorted(seen) == sorted(3 * list(range(COUNT)))


@pytest.mark.parametrize('workers', [0, 2])
def test_keeping_all_batches_warns_once_and_copy_does_not(dataset, workers):
    with make_loader(dataset, 4, workers) as loader, pytest.warns(UserWarning, match='copy=True') as caught:
        assert sum(map(numbers, list(loader)), []) == list(range(COUNT))
        assert sum(map(numbers, list(loader)), []) == list(range(COUNT))
    assert len([warning for warning in caught if 'copy=True' in str(warning.message)]) == 1
    with make_loader(dataset, 4, workers, copy=True) as loader, warnings.catch_warnings():
        warnings.simplefilter('error')
        assert sum(map(numbers, list(loader)), []) == list(range(COUNT))


@pytest.mark.parametrize('workers,slots', [(0, 2), (1, 19), (2, 16)])  # a worker has two tasks of 6 or 3 small batches
def test_the_ring_is_used_again(dataset, workers, slots):
    with make_loader(dataset, 4, workers) as loader, warnings.catch_warnings():
        warnings.simplefilter('error')
        places = {batch['large'].data_ptr() for _ in range(2) for batch in loader}
        assert len(places) <= slots == loader._slots.ring.slots


@pytest.mark.parametrize('workers,method', WAYS)
def test_a_large_ring_is_written_past_the_cache(dataset, monkeypatch, workers, method):
    monkeypatch.setattr('datatools.loader.STREAM_BYTES', 1)
    monkeypatch.setattr('datatools.loader.TASK_BYTES', 1)  # one batch a task, like batches that are large
    with make_loader(dataset, 4, workers, shuffle=True, start_method=method) as loader:
        assert sorted(sum((numbers(batch) for _ in range(2) for batch in loader), [])) == sorted(2 * list(range(COUNT)))
        assert loader._slots.ring.streams and loader._slots.ring.slots == 2 * workers + 2


@pytest.mark.parametrize('workers', [0, 2])
def test_resume_in_the_middle(dataset, workers):
    options = dict(shuffle=True, seed=9)
    with make_loader(dataset, 8, workers, **options) as loader:
        whole = [[numbers(batch) for batch in loader] for _ in range(2)]
        loader.set_epoch(1)
        for stop in (1, 6, 13):
            for batch in loader:
                state = json.loads(json.dumps(loader.state_dict()))
                if loader.batch == stop: break
            with make_loader(dataset, 8, 1, **options) as other:
                other.load_state_dict(state)
                other.set_epoch(1)
                assert [numbers(batch) for batch in other] == whole[1][stop:]
                assert other.epoch == 2
            assert (loader.epoch, loader.batch) == (1, stop)
        for changed in (dict(seed=8), dict(shuffle=False), dict(drop_last=True)):
            with pytest.raises(MismatchError, match=list(changed)[0]): make_loader(dataset, 8, 0, **{**options, **changed}).load_state_dict(state)
        with pytest.raises(UsageError, match='state_dict'): loader.load_state_dict({'epoch': 3})


@pytest.mark.parametrize('workers', [0, 2])
def test_passes_that_end_early(dataset, workers):
    with make_loader(dataset, 8, workers) as loader:
        for _ in range(4):
            for batch in loader: break
            assert numbers(batch) == list(range(8))
        first = iter(loader)
        next(first)
        assert numbers(next(iter(loader))) == list(range(8))
        with pytest.raises(DatatoolsError, match='second pass'): next(first)
        del first, batch
        assert sum((numbers(batch) for batch in loader), []) == list(range(COUNT))


class Counted:
    "As much of a dataset as a loader needs before it reads"
    def __init__(self, count): self.count = count
    def __len__(self): return self.count
    def read_into(self, indices, arrays): raise NotImplementedError


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 300), st.integers(0, 3), st.booleans(), st.integers(1, 9), st.booleans(), st.integers(1, 40))
def test_partition(count, epoch, shuffle, world_size, drop_last, batch_size):
    shares = [epoch_order(count, epoch, shuffle, 5, rank, world_size, drop_last) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    union = np.concatenate(shares)
    if drop_last: assert len(np.unique(union)) == len(union) == count // world_size * world_size
    else: assert set(union) == set(range(count)) and (len(union) - count < world_size)
    dataset = Counted(count)
    loaders = [make_loader(dataset, batch_size, shuffle=shuffle, rank=rank, world_size=world_size, drop_last=drop_last, seed=5) for rank in range(world_size)]
    sizes = [len(loader) for loader in loaders]
    assert len(set(sizes)) == 1
    assert sizes[0] == (len(shares[0]) // batch_size if drop_last else -(-len(shares[0]) // batch_size))
    indices = loaders[0]._epoch_indices()
    assert np.array_equal(indices, epoch_order(count, 0, shuffle, 5, 0, world_size, drop_last)[:len(indices)])
    assert len(indices) == (sizes[0] * batch_size if drop_last else len(shares[0]))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 300), st.booleans(), st.lists(st.tuples(st.integers(1, 5), st.integers(1, 20), st.integers(0, 9)), min_size=1, max_size=4))
def test_resume_on_another_number_of_ranks(count, shuffle, stretches):
    "Whatever ranks and batches a training goes on with: everything is read once, and nothing twice but what makes the last batches even"
    read, state = [], None
    for world_size, batch_size, batches in [*stretches, (2, 7, 10**9)]:
        loaders = [make_loader(Counted(count), batch_size, shuffle=shuffle, seed=3, rank=rank, world_size=world_size) for rank in range(world_size)]
        if state is not None:
            for loader in loaders: loader.load_state_dict(state)
        position = loaders[0].position
        shares = [loader._epoch_indices(position)[:batches * batch_size] for loader in loaders]
        assert len({len(share) for share in shares}) == 1
        read += [int(index) for share in shares for index in share]
        state = {**loaders[0].state_dict(), 'position': min(position + batches * batch_size * world_size, count)}
        if state['position'] == count: break
    assert {*read} == {*range(count)} and len(read) - count < world_size


def test_ranks_see_everything_once(dataset):
    seen = []
    for rank in range(3):
        with make_loader(dataset, 5, 0, shuffle=True, rank=rank, world_size=3) as loader: seen.append(sum((numbers(batch) for batch in loader), []))
    assert {len(share) for share in seen} == {35} and set(sum(seen, [])) == set(range(COUNT))


class Broken(PrecomputedSTFTDataset):
    "A store with one item that cannot be read, and one whose reading kills the process"
    unreadable = deadly = None

    def read_into(self, indices, arrays):
        if self.unreadable in indices: raise FormatError(f'item {self.unreadable} is damaged')
        if self.deadly in indices: os.kill(os.getpid(), signal.SIGKILL)
        super().read_into(indices, arrays)


@pytest.mark.parametrize('workers', [0, 2])
def test_an_error_arrives_in_its_place(store, workers):
    dataset = Broken(store)
    dataset.unreadable = 30
    with make_loader(dataset, 8, workers) as loader:
        for _ in range(2):
            seen = []
            with pytest.raises(FormatError, match='^item 30 is damaged$'):
                for batch in loader: seen += numbers(batch)
            assert seen == list(range(24))


@pytest.mark.parametrize('method', ['fork', 'spawn'])
def test_a_killed_worker_is_one_clear_error(store, method):
    dataset = Broken(store)
    dataset.deadly = 50
    with make_loader(dataset, 8, 2, start_method=method) as loader:
        begin = time.time()
        with pytest.raises((DatatoolsError, RuntimeError), match='killed by (SIGKILL.*memory|signal: Killed)'):
            for batch in loader: numbers(batch)  # the second is torch's own, which comes wherever the process stands
        assert time.time() - begin < 30
        dataset.deadly = None
        assert sum((numbers(batch) for batch in loader), []) == list(range(COUNT))  # with new workers


def test_a_worker_killed_between_passes_is_replaced(dataset):
    with make_loader(dataset, 8, 2) as loader:
        for batch in loader: pass
        victim = loader._worker_processes()[0]
        try:
            os.kill(victim.pid, signal.SIGKILL)
            victim.join()
            time.sleep(0.1)
        except RuntimeError as error: assert 'DataLoader worker' in str(error)  # torch tells wherever the process stands
        assert sum((numbers(batch) for batch in loader), []) == list(range(COUNT))


CHILD = '''
import os, sys, time
from datatools.stft.dataset import PrecomputedSTFTDataset
from datatools.loader import make_loader
def main():
    loader = make_loader(PrecomputedSTFTDataset(sys.argv[1]), 8, 2, start_method=sys.argv[2])
    for epoch in range(10**6):
        for batch in loader:
            if epoch == 1: print(*(worker.pid for worker in loader._worker_processes()), flush=True)
            if sys.argv[3] == 'raise' and epoch == 1: raise KeyError('from the training')
            if sys.argv[3] == 'exit' and epoch == 1: return
            time.sleep(0.001)
if __name__ == '__main__': main()
'''


def test_nothing_outlives_the_process(store, tmp_path, root):
    "However the training ends, its workers end, too; all ways at once, since those of a killed process look for it every five seconds"
    ways = [('exit', 'fork'), ('raise', 'fork'), ('SIGINT', 'fork'), ('SIGKILL', 'fork'), ('SIGKILL', 'spawn')]
    (tmp_path / 'train.py').write_text(CHILD)
    started = []
    for how, method in ways:
        command = [sys.executable, tmp_path / 'train.py', store, method, how]
        started.append(subprocess.Popen(command, env={**os.environ, 'PYTHONPATH': str(root)}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    workers = []
    for (how, method), child in zip(ways, started):
        pids = [int(pid) for pid in child.stdout.readline().split()]
        assert len(pids) == 2, child.stderr.read()
        workers += pids
        if how.startswith('SIG'): child.send_signal(getattr(signal, how))
    for (how, method), child in zip(ways, started):
        _, errors = child.communicate(timeout=60)
        allowed = {'exit': [0], 'raise': [1], 'SIGINT': [1, -signal.SIGINT]}.get(how) or [-getattr(signal, how)]
        assert child.returncode in allowed, (how, method, errors)
        if how == 'raise': assert 'from the training' in errors
    until = time.time() + 20
    while any(map(psutil.pid_exists, workers)) and time.time() < until: time.sleep(0.05)
    assert not any(map(psutil.pid_exists, workers))


def test_items_that_differ_in_shape(tmp_path):
    with StoreWriter(tmp_path / 'a', {}) as writer:
        for i in range(6): writer.append(encode_record(i, {'wave': np.zeros(3 + i, np.float32), 'number': np.int64(i)}))
        writer.complete()
    dataset = PrecomputedSTFTDataset(tmp_path / 'a')
    for workers in (0, 2):
        with make_loader(dataset, 3, workers) as loader, pytest.raises(UsageError, match='collate_fn'): list(loader)
        with make_loader(PrecomputedSTFTDataset(tmp_path / 'a', ['number']), 3, workers) as loader:
            assert [batch['number'].tolist() for batch in loader] == [[0, 1, 2], [3, 4, 5]]
        with make_loader(dataset, 3, workers, collate_fn=longest) as loader: assert list(loader) == [5, 8]


def longest(items): return max(len(item['wave']) for item in items)


def test_transforms_and_views_go_through_the_ring(store):
    dataset = PrecomputedSTFTDataset(store, ['number'], lambda item: {'half': item['number'] / 2, 'pair': torch.stack(2 * [item['number']])})
    with make_loader(dataset, 10, 2) as loader:
        batch = next(iter(loader))
        assert torch.equal(batch['half'], torch.arange(10) / 2) and batch['pair'].shape == (10, 2)
    with make_loader(PrecomputedSTFTDataset(store, ['number'], lambda item: {'text': 'a'}), 10) as loader:
        with pytest.raises(UsageError, match='collate_fn'): next(iter(loader))


def test_wrong_parameters(dataset):
    for wrong in (dict(batch_size=0), dict(batch_size=2.5), dict(workers=-1), dict(workers=True), dict(prefetch=0), dict(start_method='thread'),
                  dict(rank=2, world_size=2), dict(rank=-1), dict(world_size=0), dict(seed='a')):
        with pytest.raises(UsageError, match=list(wrong)[0]): make_loader(dataset, **{'batch_size': 4, **wrong})
    with pytest.raises(UsageError, match='epoch'): make_loader(dataset, 4).set_epoch(-1)
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match='pin_memory'): make_loader(dataset, 4, pin_memory=True)


def test_empty_and_tiny(tmp_path):
    with StoreWriter(tmp_path / 'a', {}) as writer: writer.complete()
    with make_loader(PrecomputedSTFTDataset(tmp_path / 'a'), 4, 2, shuffle=True) as loader: assert len(loader) == 0 and list(loader) == []


def test_ring_that_does_not_fit(dataset):
    with make_loader(dataset, 1 << 40, prefetch=1) as loader: assert numbers(next(iter(loader))) == list(range(COUNT))  # never larger than the dataset
    from datatools.loader import Ring
    with pytest.raises(DatatoolsError, match='smaller batch_size'): Ring({'x': ('float32', (1 << 20,))}, 1 << 20, 6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')
@pytest.mark.parametrize('workers', [0, 2])
def test_transfer_to_the_device(dataset, workers):
    with make_loader(dataset, 4, workers, shuffle=True) as loader:
        for _ in range(5):
            on_device = []
            for batch in loader:
                assert batch['large'].is_pinned()
                torch.cuda._sleep(2_000_000)  # the copy waits in the queue while the loader goes on
                on_device.append({name: tensor.to('cuda', non_blocking=True) for name, tensor in batch.items()})
            assert sorted(sum((numbers({n: t.cpu() for n, t in batch.items()}) for batch in on_device), [])) == list(range(COUNT))


@pytest.mark.parametrize('workers', [0, 2])
def test_a_closed_loader_gives_everything_back(dataset, workers):
    def held():
        gc.collect()  # what is left in cycles, as the queues of a stock loader
        return len(os.listdir('/proc/self/fd')), sum('datatools-ring' in line for line in open('/proc/self/maps'))
    def once():
        with make_loader(dataset, 8, workers) as loader:
            for batch in loader: assert held()[1] == before[1] + 1
        return batch
    before = held()
    once()  # opens the store in this process, which the dataset keeps
    before = held()
    for _ in range(3): once()
    assert held() == before
    batch = once()
    assert held()[1] == before[1] + 1 and numbers(batch)  # as long as a batch is held
    del batch
    assert held() == before


def test_is_a_loader(dataset): assert isinstance(make_loader(dataset, 4), Loader) and 'ring' not in repr(make_loader(dataset, 4))


class Unreadable(PrecomputedSTFTDataset):
    "A dataset whose items cannot be read"
    error = FormatError('item 3 is damaged')
    def __getitems__(self, indices): raise self.error
    def read_into(self, *_, **__): raise self.error


class Gone(Unreadable): error = FileNotFoundError(2, 'No such file or directory', 'a store')


@pytest.mark.parametrize('workers', [0, 1])
@pytest.mark.parametrize('kind', [Unreadable, Gone])
@pytest.mark.parametrize('collate_fn', [None, len])
def test_errors_of_workers_come_as_they_are(store, workers, kind, collate_fn):
    with kind(store) as dataset, make_loader(dataset, 4, workers, collate_fn=collate_fn) as loader:
        with pytest.raises(type(kind.error)) as caught: list(loader)
        assert str(caught.value) == str(kind.error)


@pytest.mark.parametrize('transform, said', [
    (lambda item: item['wave'], "transform='Tensor'.*a dict of arrays"), (lambda item: (item['wave'], 1), "transform='tuple'"), (lambda item: None, "transform='NoneType'"),
    (lambda item: {'x': item['wave'].bfloat16()}, "field 'x'='torch.bfloat16'.*float"), (lambda item: {'x': item['wave'].float().requires_grad_()}, "field 'x'='torch.float32'.*detach"),
    (lambda item: {'x': 'text'}, "field 'x'='text'.*collate_fn")], ids='tensor tuple none bfloat16 gradient text'.split())
def test_what_a_transform_may_return(store, transform, said):
    with PrecomputedSTFTDataset(store, transform=transform) as dataset:
        with pytest.raises(UsageError, match=said): next(iter(make_loader(dataset, 4)))


@pytest.mark.parametrize('change, said', [(dict(position=10**9), f'at most {COUNT}'), (dict(position=-3), 'at least 0'), (dict(position='x'), 'at least 0'), (dict(position=1.5), 'at least 0'), (dict(position=True), 'at least 0'), (dict(epoch=-1), 'at least 0'), (dict(epoch=None), 'at least 0')], ids=str)
def test_a_state_that_no_loader_was_in(dataset, change, said):
    loader = make_loader(dataset, 4)
    with pytest.raises(UsageError, match=f'{[*change][0]}.*{said}'): loader.load_state_dict({**loader.state_dict(), **change})
    assert (loader.epoch, loader.batch) == (0, 0)
    loader.load_state_dict({**loader.state_dict(), 'position': COUNT})
    assert not list(loader)


def test_the_state_of_another_store(dataset, tmp_path):
    "As many items are not the same items"
    with StoreWriter(tmp_path/'other', dict(another=1)) as writer:
        for i in range(COUNT): writer.append(encode_record(i, {'number': np.int64(i)}))
        writer.complete()
    with PrecomputedSTFTDataset(tmp_path/'other') as other:
        with pytest.raises(MismatchError, match='identity='): make_loader(other, 4).load_state_dict(make_loader(dataset, 4).state_dict())


@pytest.mark.parametrize('workers', [0, 2])
def test_another_epoch_ends_the_pass(dataset, workers):
    with make_loader(dataset, 8, workers, shuffle=True) as loader:
        running = iter(loader)
        next(running)
        loader.set_epoch(7)
        with pytest.raises(DatatoolsError, match='set_epoch was called'): next(running)
        assert (loader.epoch, loader.batch) == (7, 0)
        assert sorted(sum(map(numbers, loader), [])) == list(range(COUNT)) and loader.epoch == 8


def test_memory_within_the_limits_of_a_container(tmp_path):
    (tmp_path/'own').write_text('0::/job/step\n')
    def group(folder, most, current, **stat):
        (tmp_path/folder).mkdir(exist_ok=True)
        for name, value in (('max', most), ('current', current), ('stat', ''.join(f'{key} {number}\n' for key, number in stat.items()))): (tmp_path/folder/f'memory.{name}').write_text(f'{value}\n')
    def available(): return _available_bytes(str(tmp_path), str(tmp_path/'own'))
    machine = psutil.virtual_memory().available
    group('job', 'max', 10**6)
    assert available() > machine / 2  # no limit
    group('job/step', 10 << 20, 9 << 20, anon=0, inactive_file=2 << 20, active_file=1 << 20)
    assert available() == 4 << 20  # files that are cached make room
    group('job', 5 << 20, 4 << 20)
    assert available() == 1 << 20  # the narrowest limit counts
    group('job', 5 << 20, 6 << 20)
    assert available() == 0
    (tmp_path/'own').write_text('12:memory:/old\n')
    assert available() > machine / 2
    assert _available_bytes() <= psutil.virtual_memory().total
