"""Processes that train together, as torchrun starts them: every item reaches one of them, all have equally many batches,
what two of them began three can finish, and a network learns on two ranks what it learns on one."""
import json
import os
import shutil
import subprocess
import sys
import zlib

import numpy as np
import pytest
import soundfile
import torch
from made_up_positions import write_shards
from test_vst_reader import TOTAL, write_chunk, write_manifest
from typer.testing import CliRunner

from datatools.pool.__main__ import app
from datatools.pool.dataset import StreamingMixedShardDataset
from datatools.pool.network import load_checkpoint
from datatools.stft.dataset import PrecomputedSTFTDataset
from datatools.stft.precompute import PrecomputeOptions, precompute
from datatools.stft.transform import STFTConfig

# What every rank does: the second half of an epoch on another number of ranks than the first, then training.
RANK = '''
import json, os, signal, sys, zlib
from pathlib import Path
from datatools.pool.dataset import StreamingMixedShardDataset, make_loader as pool_loader
from datatools.pool.network import make_network
from datatools.loader import make_loader, place
from datatools.pool.ranks import joined
from datatools.pool import training
from datatools.pool.trainer import Trainer, TrainingSettings, create_datasets
from datatools.pool.training import train
from datatools.stft import PrecomputedSTFTDataset, ShardedSTFTDataset
from datatools.vst.reader import ChunkedDatasetReader

here, part = Path(sys.argv[1]), sys.argv[2]

def read(dataset, workers, state, most, number='index', size=4):
    found = []
    with make_loader(dataset, size, workers, shuffle=True, seed=3, metadata=True) as loader:
        if state is not None: loader.load_state_dict(state)
        for batch in loader:
            found.append([facts[number] for facts in batch['metadata']])
            if len(found) == most: return found, loader.state_dict()
        loader.set_epoch(5)
        return found, dict(later=[facts[number] for batch in loader for facts in batch['metadata']])

def pool(state, most):
    found, loader = [], pool_loader(StreamingMixedShardDataset([here/'a', here/'b'], pool_size=300, random_seed=5, batch_size=16, enable_augmentation=False), 1)
    if state is not None: loader.load_state_dict(state)
    for batch in loader:
        found.append([zlib.crc32(board.numpy().tobytes() + move.numpy().tobytes()) for board, move in zip(batch['board'], batch['policy'])])
        if len(found) == most: break
    return found, loader.state_dict()

def learn(directory, resume, die_at=None):
    class Dying(Trainer):
        def learn(self, batch):
            super().learn(batch)
            if self.step == die_at and self.rank == 1: os.kill(os.getpid(), signal.SIGKILL)
    training.Trainer = Dying
    data = create_datasets([here/'a', here/'b'], batch_size=48 // place()[1], pool_size=300, random_seed=0)
    settings = TrainingSettings(epochs=2, checkpoint_every=5)
    train(make_network('8x1', 4, 0), *data, settings, here/directory, resume, show=False)

with joined():
    rank, ranks = place()
    states = json.loads((here/'states.json').read_text()) if part == 'rest' else {}
    most = 10**9 if part == 'rest' else 3
    found = dict(single=read(PrecomputedSTFTDataset(here/'stores/train.lmdb'), 1, states.get('single'), most),
                 sharded=read(ShardedSTFTDataset(here/'shards'), 0, states.get('sharded'), most),
                 pool=pool(states.get('pool'), most),
                 vst=read(ChunkedDatasetReader(here/'vst').arrays(['audio', 'midi_note']), 1, states.get('vst'), most, 'global_id', 2))
    (here/f'{part}-{rank}.json').write_text(json.dumps(found))
    if part == 'rest': learn('three', True)
    else:
        learn('two', False)
        learn('killed', False, die_at=42)
'''
EVERY = PrecomputeOptions(workers=0)


def torchrun(ranks, *command):
    return subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={ranks}', *map(str, command)], timeout=180,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'}, capture_output=True, text=True)


@pytest.fixture(scope='module')
def here(tmp_path_factory):
    "Data for all, the first half of an epoch read by two ranks, the rest by three, and three trainings"
    here = tmp_path_factory.mktemp('ranks')
    (here/'corpus').mkdir()
    for number in range(9): soundfile.write(here/f'corpus/{number}.wav', np.random.default_rng(number).normal(0, .1, 800 * (3 + number % 3)), 8000)
    for name, shards in dict(stores=None, shards=4).items():
        precompute(here/'corpus', here/name, STFTConfig(8000, (256,), 64, segment_seconds=.1), 0, options=EVERY, shards=shards)
    for name, rows in dict(a=1203, b=800).items(): write_shards(here/name, rows, seed=rows)
    (here/'vst').mkdir()
    for chunk in range(5): write_chunk(here/'vst', chunk)
    write_manifest(here/'vst')
    (here/'rank.py').write_text(RANK)
    first = torchrun(2, here/'rank.py', here, 'first')
    assert first.returncode and 'SIGKILL' in first.stderr and (here/'two/best.pt').exists(), first.stderr[:3000]
    (here/'states.json').write_text(json.dumps({name: state for name, (_, state) in json.loads((here/'first-0.json').read_text()).items()}))
    shutil.copytree(here/'killed', here/'three')
    rest = torchrun(3, here/'rank.py', here, 'rest')
    assert not rest.returncode, rest.stderr[:3000]
    return here


def found(here, part, ranks, name): return [json.loads((here/f'{part}-{rank}.json').read_text())[name] for rank in range(ranks)]


def everything(here, name):
    if name == 'vst': return [*range(TOTAL)]
    if name == 'pool':
        batches = StreamingMixedShardDataset([here/'a', here/'b'], pool_size=300, random_seed=0, batch_size=100, enable_augmentation=False)
        return sorted(zlib.crc32(board.numpy().tobytes() + move.numpy().tobytes()) for batch in batches for board, move in zip(batch['board'], batch['policy']))
    if name in ('single', 'sharded'): return [*range(len(PrecomputedSTFTDataset(here/'stores/train.lmdb')))]


@pytest.mark.parametrize('name', ['single', 'sharded', 'pool', 'vst'])
def test_every_item_reaches_one_rank_in_equally_many_batches(here, name):
    first, rest = found(here, 'first', 2, name), found(here, 'rest', 3, name)
    for part in (first, rest):
        assert len({len(batches) for batches, _ in part}) == 1
        if 'later' not in str(part[0][1]): assert len({json.dumps(state) for _, state in part}) == 1
    read = [item for part in (first, rest) for batches, _ in part for batch in batches for item in batch]
    if name == 'pool': assert sorted(read) == everything(here, name)
    else: assert {*read} == {*everything(here, name)} and len(read) - len({*read}) < 3


def test_shards_are_read_as_one_store(here):
    for part, ranks in (('first', 2), ('rest', 3)):
        assert [batches for batches, _ in found(here, part, ranks, 'single')] == [batches for batches, _ in found(here, part, ranks, 'sharded')]
    later = [state['later'] for _, state in found(here, 'rest', 3, 'sharded')]
    assert {*sum(later, [])} == {*everything(here, 'sharded')} and later[0] != sorted(later[0])


def trained(directory):
    checkpoint = load_checkpoint(directory/'checkpoint.pt')
    return checkpoint['model'], [json.loads(line) for line in (directory/'history.jsonl').read_text().splitlines()]


def distances(one, other): return np.concatenate([(x.double() - y.double()).abs().flatten().numpy() for x, y in zip(one.values(), other.values(), strict=True)])


def losses(history): return [[line[data]['loss'] for data in ('train', 'validation')] for line in history]


def test_two_ranks_learn_what_one_learns(here):
    run = CliRunner().invoke(app, ['train', str(here/'a'), str(here/'b'), '--output-dir', str(here/'one'), '--network', '8x1', '--epochs', '2', '--batch-size', '48', '--pool-size', '300'])
    assert run.exit_code == 0, run.output
    (one, history), (two, of_two), (three, of_three) = (trained(here/name) for name in ('one', 'two', 'three'))
    assert [line['step'] for line in history] == [line['step'] for line in of_two] == [line['step'] for line in of_three]
    assert [line['rows'] for line in history] == [line['rows'] for line in of_two]
    assert np.allclose(losses(of_two), losses(history), rtol=1e-3) and np.allclose(losses(of_three), losses(history), rtol=1e-3)
    for several in two, three:  # AdamW makes steps of one size out of gradients that are nearly zero, whose sign is a matter of rounding
        assert np.quantile(distances(one, several), .99) < 1e-6 and distances(one, several).max() < 2e-2


def test_a_killed_training_goes_on_to_the_same_bits(here):
    "By the command, although a script began it"
    run = torchrun(2, '-m', 'datatools.pool', 'train', here/'a', here/'b', '--output-dir', here/'killed', '--network', '8x1', '--epochs', '2', '--batch-size', '48',
                   '--pool-size', '300', '--resume', '--json')
    assert not run.returncode, run.stderr[:3000]
    (killed, history), (two, of_two) = trained(here/'killed'), trained(here/'two')
    assert all(torch.equal(x, y) for x, y in zip(killed.values(), two.values(), strict=True))
    assert losses(history) == losses(of_two) and json.loads(run.stdout)['step'] == history[-1]['step'] > 42  # printed by one rank
