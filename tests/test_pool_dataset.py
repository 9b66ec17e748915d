"The mixed stream: exactly once, the same for any ranks and workers, resumed anywhere, within its memory."
import copy
import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from datatools.core import FormatError, MemoryLimitError, MismatchError, UsageError, peak_rss_bytes, rss_bytes
from datatools.pool.codecs import RecordCodec
from datatools.pool.dataset import PoolMemoryError, StreamingMixedShardDataset, make_loader
from datatools.pool.order import EpochPlan, Share
from datatools.pool.shards import finish_directory, write_shard
from datatools.pool.sources import find_shards

KIND = np.dtype([('row', '<u4'), ('shard', '<u2'), ('directory', '<u2')])
ODD = np.dtype([('number', '<u4'), ('text', 'S9')])  # 13 bytes: not whole words
QUOTED = dict(pool_size=700, random_seed=5, batch_size=64)


def write_directory(path, number, shard_rows, kind=KIND):
    path.mkdir(parents=True)
    for shard, rows in enumerate(shard_rows):
        records = np.zeros(rows, kind)
        for name, values in dict(row=np.arange(rows), number=np.arange(rows) + 1000 * shard, shard=shard, directory=number).items():
            if name in kind.names: records[name] = values
        if 'text' in kind.names: records['text'] = [f'{shard}:{row}' for row in range(rows)]
        write_shard(path/f'shard_{shard:04d}.records', records, codec=RecordCodec(kind))
    finish_directory(path, RecordCodec(kind))
    return path


@pytest.fixture(scope='module')
def directories(tmp_path_factory):
    base = tmp_path_factory.mktemp('pool')
    return [write_directory(base/'a', 0, [900, 1, 2500]), write_directory(base/'b', 1, [300, 301]), write_directory(base/'c', 2, [17])]


def keys(batches):
    "One number for each row of a stream"
    batches = list(batches)
    if not batches: return np.empty(0, np.int64)
    column = lambda name: np.concatenate([np.asarray(batch[name]) for batch in batches]).astype(np.int64)
    return column('row') + (column('shard') << 32) + (column('directory') << 48)


def everything(directories): return np.sort(keys([shard.records() for shard in StreamingMixedShardDataset(directories, random_seed=0).shards]))


@given(st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=4), min_size=1, max_size=5), st.integers(1, 2000), st.integers(0, 99))
@settings(max_examples=150, deadline=None)
def test_every_row_once_and_every_prefix_in_proportion(sizes, pool_size, seed):
    plan = EpochPlan(sizes, pool_size, seed)
    rows = np.concatenate([plan.rows_of_round(number) for number in range(plan.rounds)])
    assert len(np.unique(rows, axis=0)) == len(rows) == plan.length == sum(map(sum, sizes))
    assert np.diff(plan.bounds).max() <= pool_size
    assert abs(plan.counts - plan.bounds[:, None] * plan.from_directory / plan.length).max() < 1


@pytest.mark.parametrize('order', ['rounds', 'sequential'])
@pytest.mark.parametrize('seed', range(3))
def test_the_stream_is_every_row_once_in_the_quota(directories, order, seed):
    dataset = StreamingMixedShardDataset(directories, pool_size=500, batch_size=37, random_seed=seed, order=order)
    found = keys(dataset.raw_batches())
    assert np.array_equal(np.sort(found), everything(directories))
    if order == 'rounds':
        shares = np.array([3401, 601, 17]) / 4019
        counts = np.cumsum((found >> 48)[:, None] == np.arange(3), axis=0)
        assert abs(counts - np.arange(1, 4020)[:, None] * shares).max() < 1
    sources = np.concatenate(list(dataset.provenance()))
    names = np.array([(each.directory.path.name, int(shard.path.stem[-4:])) for each in dataset.sources for shard in each.shards], object)
    assert np.array_equal(sources[:, 1], found & 0xFFFFFFFF)
    assert np.array_equal(names[sources[:, 0], 1].astype(int), found >> 32 & 0xFFFF) and np.array_equal([ord(name) - ord('a') for name in names[sources[:, 0], 0]], found >> 48)


@pytest.mark.parametrize('order', ['rounds', 'sequential'])
def test_ranks_and_workers_share_one_stream(directories, order):
    options = dict(QUOTED, order=order)
    whole = keys(StreamingMixedShardDataset(directories, **options))
    for ranks in (1, 2, 3, 8):
        for workers in (0, 1, 2, 4):
            parts = [[keys([batch]) for batch in make_loader(StreamingMixedShardDataset(directories, rank=rank, world_size=ranks, **options), workers)]
                     for rank in range(ranks if workers < 2 or ranks < 3 else 2)]
            lengths = {len(part) for part in parts}
            assert lengths == {len(StreamingMixedShardDataset(directories, rank=0, world_size=ranks, **options))}
            if len(parts) == ranks: assert np.array_equal(np.concatenate([batch for group in zip(*parts) for batch in group]), whole), (ranks, workers)
            else:
                for rank, part in enumerate(parts):
                    full = 4019 // (64 * ranks) * 64 * ranks  # what is left after that is divided evenly
                    for number, batch in enumerate(part[:full // (64 * ranks)]): assert np.array_equal(batch, whole[64 * (ranks * number + rank):][:64])


@pytest.mark.parametrize('order', ['rounds', 'sequential'])
def test_resumed_at_every_batch(directories, order):
    options = dict(QUOTED, order=order)
    dataset = StreamingMixedShardDataset(directories, **options)
    dataset.set_epoch(3)
    states, batches = [dataset.state_dict()], []
    for batch in dataset:
        batches.append(batch)
        states.append(json.loads(json.dumps(dataset.state_dict())))
    whole = keys(batches)
    for number, state in enumerate(states):
        ranks = 1 + number % 3
        again = [StreamingMixedShardDataset(directories, rank=rank, world_size=ranks, **options) for rank in range(ranks)]
        for each in again: each.load_state_dict(state)
        parts = [[keys([batch]) for batch in each.raw_batches()] for each in again]
        rest = np.concatenate([np.empty(0, np.int64), *(batch for group in zip(*parts) for batch in group)])
        assert np.array_equal(rest, whole[number * 64:]), (number, ranks)


def test_a_state_taken_with_ranks_goes_on_with_others(directories):
    whole = keys(StreamingMixedShardDataset(directories, **QUOTED))
    ranks = [StreamingMixedShardDataset(directories, rank=rank, world_size=3, **QUOTED) for rank in range(3)]
    streams = [iter(each) for each in ranks]
    for _ in range(7): [next(stream) for stream in streams]
    states = [each.state_dict() for each in ranks]
    assert states[0] == states[1] == states[2] and states[0]['position'] == 7 * 3 * 64
    alone = StreamingMixedShardDataset(directories, **QUOTED)
    alone.load_state_dict(states[0])
    assert np.array_equal(keys(alone), whole[7 * 3 * 64:])
    assert np.array_equal(keys(alone), whole), 'the pass after a finished one begins anew'


@pytest.mark.parametrize('context', ['fork', 'spawn'])
def test_loader_under_fork_and_spawn(directories, context):
    whole = keys(StreamingMixedShardDataset(directories, **QUOTED))
    loader = torch.utils.data.DataLoader(StreamingMixedShardDataset(directories, **QUOTED), batch_size=None, num_workers=2, multiprocessing_context=context)
    assert np.array_equal(keys(loader), whole)


def test_epochs_reach_workers_that_stay(directories):
    loader = make_loader(StreamingMixedShardDataset(directories, **QUOTED), 2)
    alone = StreamingMixedShardDataset(directories, **QUOTED)
    for epoch in (0, 1, 5, 1):
        loader.set_epoch(epoch)
        alone.set_epoch(epoch)
        assert np.array_equal(keys(loader), keys(alone))


RANK = '''
import sys, json, numpy as np, torch.distributed as dist
from datatools.pool.dataset import StreamingMixedShardDataset, make_loader
dist.init_process_group('gloo')
dataset = StreamingMixedShardDataset(sys.argv[2:], pool_size=700, random_seed=5, batch_size=64)
loader = make_loader(dataset, 1)
rows = [int(x) for batch in loader for x in (batch['row'].long() + (batch['shard'].long() << 32) + (batch['directory'].long() << 48))]
json.dump(dict(rows=rows, batches=len(loader)), open(f'{sys.argv[1]}/{dist.get_rank()}.json', 'w'))
dist.destroy_process_group()
'''


@pytest.mark.parametrize('ranks', [2, 3])
def test_torchrun(directories, tmp_path, ranks):
    (tmp_path/'rank.py').write_text(RANK)
    subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={ranks}', tmp_path/'rank.py', tmp_path, *directories],
                   check=True, timeout=120, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    found = [json.loads((tmp_path/f'{rank}.json').read_text()) for rank in range(ranks)]
    assert len({each['batches'] for each in found}) == 1
    assert np.array_equal(np.sort(np.concatenate([each['rows'] for each in found])), everything(directories))


def test_records_of_any_width(tmp_path):
    write_directory(tmp_path/'odd', 0, [100, 250], ODD)
    dataset = StreamingMixedShardDataset([tmp_path/'odd'], pool_size=60, batch_size=7, random_seed=0)
    found = np.concatenate(list(dataset.raw_batches()))
    expected = np.concatenate([shard.records() for shard in dataset.shards])
    assert np.array_equal(np.sort(found, order='number'), np.sort(expected, order='number')) and (found != expected).any()
    assert sum(len(batch['number']) for batch in dataset) == 350


def test_weights_and_fewer_examples(directories):
    dataset = StreamingMixedShardDataset(directories, pool_size=200, batch_size=20, random_seed=0, weights=[1, 1, .02])
    seen = []
    for epoch in range(8):
        dataset.set_epoch(epoch)
        found = keys(dataset.raw_batches())
        assert len(np.unique(found)) == len(found) == dataset.plan.length
        counts = np.bincount(found >> 48)
        assert counts.max() - counts[1] <= 1 and counts[1] == 601 and counts[2] == round(601 * .02)
        seen.append(found)
    assert len(np.unique(np.concatenate(seen))) > 4000, 'every row has its turn in some epoch'
    few = StreamingMixedShardDataset(directories, pool_size=200, batch_size=20, random_seed=0, max_examples_unaugmented=1000)
    found = keys(few.raw_batches())
    assert len(found) == len(np.unique(found)) == 1000 and abs(np.bincount(found >> 48) - 1000 * np.array([3401, 601, 17]) / 4019).max() < 1


def test_game_ordered_shards_are_mixed_like_a_full_shuffle(tmp_path):
    rows, window = 200_000, 1000
    write_directory(tmp_path/'games', 0, [rows // 20] * 20)
    dataset = StreamingMixedShardDataset([tmp_path/'games'], pool_size=rows // 20, batch_size=window, random_seed=1)
    assert dataset.plan.rounds == 20
    sources = np.concatenate(list(dataset.provenance()))
    windows = np.stack([np.bincount(part, minlength=20) for part in sources[:, 0].reshape(-1, window)])
    freedom = ((windows - window / 20) ** 2 / (window / 20)).sum() / (19 * len(windows))
    assert .8 < freedom < 1.1
    twentieths = np.stack([np.bincount(part, minlength=20) for part in sources[:, 0].reshape(20, -1)]) / (rows / 20)
    assert abs(twentieths - .05).max() <= .012
    game = sources[:, 0] * 1000 + sources[:, 1] // 60
    together = np.mean([len(part) - len(np.unique(part)) for part in game.reshape(-1, window)])
    shuffled = np.mean([len(part) - len(np.unique(part)) for part in np.random.default_rng(0).permutation(game).reshape(-1, window)])
    assert together < 1.1 * shuffled


def test_shards_that_change_while_they_are_read(tmp_path):
    path = write_directory(tmp_path/'a', 0, [500, 500])
    dataset = StreamingMixedShardDataset([path], pool_size=100, batch_size=10, random_seed=0)
    stream = dataset.raw_batches()
    next(stream)
    last = dataset.shards[1].path
    whole = last.read_bytes()
    last.unlink()
    assert sum(map(len, stream)) == 990, 'what is mapped stays whole'
    with pytest.raises(MismatchError, match='is gone'): list(dataset.raw_batches())
    last.write_bytes(whole[:2000])
    with pytest.raises((FormatError, MismatchError), match='truncated|changed'): list(dataset.raw_batches())
    with pytest.raises(MismatchError, match='changed since its manifest'): StreamingMixedShardDataset([path], random_seed=0)
    last.write_bytes(whole)
    assert len(keys(dataset.raw_batches())) == 1000


def test_a_state_of_another_stream_is_refused(directories):
    state = StreamingMixedShardDataset(directories, **QUOTED).state_dict()
    for change in (dict(random_seed=6), dict(pool_size=701), dict(order='sequential'), dict(weights='shards'), dict(max_examples_unaugmented=5), dict(enable_augmentation=False)):
        with pytest.raises(MismatchError, match=next(iter(change)).replace('random_', '')): StreamingMixedShardDataset(directories, **{**QUOTED, **change}).load_state_dict(state)
    with pytest.raises(MismatchError, match='rows'): StreamingMixedShardDataset(directories[:2], **QUOTED).load_state_dict(state)
    for wrong in (None, {}, {**state, 'position': -1}, {**state, 'position': 10**9}, {**state, 'epoch': 'x'}):
        with pytest.raises(UsageError): StreamingMixedShardDataset(directories, **QUOTED).load_state_dict(wrong)


def test_memory_of_all_workers_counts(directories, tmp_path):
    write_directory(tmp_path/'many', 0, [2_000_000])
    dataset = StreamingMixedShardDataset([tmp_path/'many'], batch_size=1000, random_seed=0, max_memory_gb=(rss_bytes() + 250e6) / 1e9)
    loader = make_loader(dataset, 30)
    with pytest.raises(MemoryLimitError, match='in 30 workers'): next(iter(loader))


def test_a_copy_has_an_epoch_that_its_workers_see(directories):
    for copied in (copy.deepcopy, lambda dataset: pickle.loads(pickle.dumps(dataset))):
        loader = make_loader(copied(StreamingMixedShardDataset(directories, **QUOTED)), 1)
        alone = StreamingMixedShardDataset(directories, **QUOTED)
        for epoch in (0, 3):
            loader.set_epoch(epoch)
            alone.set_epoch(epoch)
            assert np.array_equal(keys(loader), keys(alone))


def test_errors_of_workers_come_as_they_are(tmp_path):
    path = write_directory(tmp_path/'a', 0, [500, 500])
    dataset = StreamingMixedShardDataset([path], pool_size=100, batch_size=10, random_seed=0)
    dataset.shards[1].path.unlink()
    with pytest.raises(MismatchError, match='is gone|missing') as caught: list(make_loader(dataset, 1))
    assert 'Traceback' not in str(caught.value)
    error = PoolMemoryError('too much', dict(rss_bytes=1), dict(position=5))
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == 'too much' and again.report == error.report and again.state == error.state


def test_a_breach_in_a_worker_brings_the_state(directories):
    dataset = StreamingMixedShardDataset(directories, **QUOTED)
    loader = make_loader(dataset, 1)
    dataset._check_memory = lambda *_: None  # what is needed fits; what the process has is the matter here
    dataset.max_memory_gb = 1e-3
    with pytest.raises(PoolMemoryError, match='resident') as caught: list(loader)
    assert caught.value.state['facts'] == dataset.facts()


@given(st.integers(1, 60), st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(0, 20))
@settings(max_examples=300, deadline=None)
def test_all_ranks_have_as_many_batches(total, batch, ranks, workers, start):
    start = min(start, total)
    had = [[span for worker in range(workers) for span in Share(total, batch, start, ranks, rank, workers, worker).batches()] for rank in range(ranks)]
    assert {len(each) for each in had} == {len(Share(total, batch, start, ranks))}
    given_out = sorted(span for each in had for span in each)
    assert [begin for begin, _ in given_out] == [start, *(end for _, end in given_out)][:len(given_out)]
    left = total - max([start, *(end for _, end in given_out)])
    assert left < ranks and (left == 0 or batch == 1 or total - start < ranks)


def test_single_examples_over_ranks(directories):
    whole = keys(StreamingMixedShardDataset(directories, **QUOTED))
    ranks = [StreamingMixedShardDataset(directories, pool_size=700, random_seed=5, rank=rank, world_size=3) for rank in range(3)]
    parts = [[keys([{name: value[None] for name, value in example.items()}]) for example in dataset] for dataset in ranks]
    assert {len(part) for part in parts} == {len(ranks[0])} == {4019 // 3}
    assert np.array_equal(np.concatenate([row for group in zip(*parts) for row in group]), whole[:4019 // 3 * 3])
    stream = ranks[0].raw_batches()
    for expected in (3, 6, 9):
        next(stream)
        assert ranks[0].position == expected


def test_seeds_choose_other_parts_of_the_shards(directories):
    few = [keys(StreamingMixedShardDataset(directories, pool_size=200, random_seed=seed, max_examples_unaugmented=300).raw_batches()) for seed in range(3)]
    assert all(len(np.intersect1d(few[0], other)) < 250 for other in few[1:])


def test_many_small_shards(tmp_path):
    write_directory(tmp_path/'many', 0, [5] * 800)
    dataset = StreamingMixedShardDataset([tmp_path/'many'], pool_size=100, batch_size=50, random_seed=0)
    begin = time.process_time()
    assert np.array_equal(np.sort(keys(dataset.raw_batches())), everything([tmp_path/'many']))
    assert time.process_time() - begin < 20
    assert dataset.stats()['pool_bytes'] >= 16 * 4000, 'the plan of what is left over counts'


def test_a_stock_loader_does_not_pretend_to_know_the_position(directories):
    dataset = StreamingMixedShardDataset(directories, **QUOTED)
    assert len(list(torch.utils.data.DataLoader(dataset, batch_size=None, num_workers=1))) == len(dataset)
    with pytest.raises(UsageError, match='make_loader'): dataset.state_dict()


def test_an_epoch_that_weights_shorten_is_told_of(directories):
    with pytest.warns(UserWarning, match='of 4,019 records: it ends when those of .*c are used up'): StreamingMixedShardDataset(directories, random_seed=0, weights='shards')
    sources = find_shards(directories)
    with pytest.raises(UsageError, match='weights='): StreamingMixedShardDataset(sources, random_seed=0, weights='shards')


def growth_of_sequential(path):
    dataset = StreamingMixedShardDataset([path], batch_size=1000, random_seed=0, order='sequential', pool_size=2_000_000)
    before = peak_rss_bytes()
    next(dataset.raw_batches())
    return peak_rss_bytes() - before


def test_sequential_keeps_to_its_memory(tmp_path):
    write_directory(tmp_path/'large', 0, [3_000_000])
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as process:  # one that has needed nothing yet
        assert process.submit(growth_of_sequential, tmp_path/'large').result() < 2_000_000 * 8 + 60e6


def growth_of_a_second_epoch(path):
    dataset = StreamingMixedShardDataset([path], batch_size=1000, random_seed=0)
    peaks = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        for batch in dataset.raw_batches(): pass
        peaks.append(peak_rss_bytes())
    return peaks[1] - peaks[0]


def test_a_pool_is_given_back_before_the_next_epoch(tmp_path):
    write_directory(tmp_path/'large', 0, [4_000_000])  # a pool of 24 MB
    with ProcessPoolExecutor(1, multiprocessing.get_context('spawn')) as process:
        assert process.submit(growth_of_a_second_epoch, tmp_path/'large').result() < 12e6
