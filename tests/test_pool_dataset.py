"The mixed stream: exactly once, the same for any ranks and workers, resumed anywhere, within its memory."
import json
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from datatools.core import FormatError, MemoryLimitError, MismatchError, UsageError
from datatools.pool.codecs import RecordCodec
from datatools.pool.dataset import StreamingMixedShardDataset, make_loader
from datatools.pool.order import EpochPlan, Share
from datatools.pool.shards import ShardWriter

KIND = np.dtype([('row', '<u4'), ('shard', '<u2'), ('directory', '<u2')])
ODD = np.dtype([('number', '<u4'), ('text', 'S9')])  # 13 bytes: not whole words
QUOTED = dict(pool_size=700, random_seed=5, batch_size=64)


def write_directory(path, number, shard_rows, kind=KIND):
    from datatools.pool.shards import finish_directory, write_shard
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
    assert np.array_equal(np.concatenate(list(dataset.provenance()))[:, 1], found & 0xFFFFFFFF)


@pytest.mark.parametrize('order', ['rounds', 'sequential'])
def test_ranks_and_workers_share_one_stream(directories, order):
    options = dict(QUOTED, order=order)
    whole = keys(StreamingMixedShardDataset(directories, **options))
    for ranks in (1, 2, 3, 8):
        for workers in (0, 1, 2, 4):
            parts = [[keys([batch]) for batch in make_loader(StreamingMixedShardDataset(directories, rank=rank, world_size=ranks, **options), workers)]
                     for rank in range(ranks if workers < 2 or ranks < 3 else 1)]
            lengths = {len(part) for part in parts}
            assert lengths == {len(StreamingMixedShardDataset(directories, rank=0, world_size=ranks, **options))}
            if len(parts) == ranks: assert np.array_equal(np.concatenate([batch for group in zip(*parts) for batch in group]), whole), (ranks, workers)
            else: assert np.array_equal(parts[0][0], whole[:64]) and np.array_equal(parts[0][1], whole[64 * ranks:64 * ranks + 64])


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
    from datatools.pool.shards import ShardDirectory
    path = write_directory(tmp_path/'a', 0, [500, 500])
    dataset = StreamingMixedShardDataset([path], pool_size=100, batch_size=10, random_seed=0)
    stream = dataset.raw_batches()
    next(stream)
    last = dataset.shards[1].path
    whole = last.read_bytes()
    last.unlink()
    with pytest.raises(MismatchError, match='is gone'): list(stream)
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
    dataset = StreamingMixedShardDataset([tmp_path/'many'], batch_size=1000, random_seed=0, max_memory_gb=.6)
    loader = make_loader(dataset, 30)
    with pytest.raises(MemoryLimitError, match='in 30 workers'): next(iter(loader))
