"""Training across process boundaries: kills, Ctrl-C, damaged files, and the same weights to the last bit."""
import json
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from made_up_positions import MadeUpPositions, write_shards
from torch import nn

from datatools.core import FormatError, LockedError, MismatchError, UsageError, file_lock
from datatools.pool.dataset import make_loader
from datatools.pool.network import PolicyValueNet, load_network, make_network
from datatools.pool.trainer import DivergedError, Trainer, TrainingSettings, create_datasets
from datatools.pool.training import train

SETTINGS = TrainingSettings(epochs=3, warmup_steps=5, checkpoint_every=4)
RUN = '''
import sys, torch
sys.path.insert(0, {tests!r})
from made_up_positions import MadeUpPositions
from datatools.pool.dataset import make_loader
from datatools.pool.network import make_network
from datatools.pool.trainer import TrainingSettings
from datatools.pool.training import train
torch.set_num_threads(1)
train(make_network('16x2', 4), MadeUpPositions(delay={delay}), MadeUpPositions(batches=3, seed=1),
      TrainingSettings(epochs=3, warmup_steps=5, checkpoint_every=4), {directory!r}, resume=True, show=False)
'''


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def datasets(): return MadeUpPositions(), MadeUpPositions(batches=3, seed=1)


@pytest.mark.parametrize('device', ['foo', 'cuda:99', '', None, 3])
def test_a_device_that_is_not_there_leaves_nothing_behind(tmp_path, device):
    with pytest.raises(UsageError, match='^device='): train(make_network('16x2', 4), *datasets(), SETTINGS, tmp_path/'out', device=device)
    assert not (tmp_path/'out').exists()


def same(a, b): return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def start(directory, delay=.05):
    code = RUN.format(tests=str(Path(__file__).parent), delay=delay, directory=str(directory))
    return subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'nothing came'
        time.sleep(.02)


@pytest.fixture(scope='module')
def whole():
    torch.set_num_threads(1)
    return train(make_network('16x2', 4), *datasets(), SETTINGS, show=False)


@pytest.mark.parametrize('how', [signal.SIGKILL, signal.SIGINT])
def test_a_training_that_was_stopped_ends_with_the_same_weights(tmp_path, whole, how):
    run = start(tmp_path)
    wait_for(lambda: (tmp_path/'checkpoint.pt').exists())
    time.sleep(.2)
    run.send_signal(how)
    _, errors = run.communicate(timeout=60)
    assert run.returncode in (-how, 130, 1) and (how == signal.SIGKILL or 'KeyboardInterrupt' in errors), errors
    step = torch.load(tmp_path/'checkpoint.pt', weights_only=True)['step']
    assert 0 < step < 36
    if how == signal.SIGINT: assert not list(tmp_path.glob('.*.tmp'))
    resumed = train(make_network('16x2', 4, seed=5), *datasets(), SETTINGS, tmp_path, resume=True, show=False)
    assert same(resumed.model, whole.model) and resumed.steps == 36
    assert [line['validation'] for line in resumed.history] == [line['validation'] for line in whole.history]
    assert [json.loads(line)['step'] for line in (tmp_path/'history.jsonl').read_text().splitlines()] == [12, 24, 36]


@pytest.mark.parametrize('step', [1, 11, 12, 13, 24, 35])
def test_resumed_at_any_step(tmp_path, whole, step):
    settings = TrainingSettings(epochs=3, warmup_steps=5, checkpoint_every=1)
    class Stop(Exception): pass
    class Stopping(Trainer):
        def learn(self, batch):
            if self.step == step: raise Stop
            super().learn(batch)
    trainer = Stopping(make_network('16x2', 4), *datasets(), settings, tmp_path)
    trainer.prepare()
    with pytest.raises(Stop): trainer.run(show=False)
    resumed = train(make_network('16x2', 4), *datasets(), settings, tmp_path, resume=True, show=False)
    assert same(resumed.model, whole.model)
    assert [(line['step'], line['train']) for line in resumed.history] == [(line['step'], line['train']) for line in whole.history]


def test_random_numbers_of_the_model_go_on_too(tmp_path):
    class Dropping(PolicyValueNet):
        def forward(self, board): return super().forward(nn.functional.dropout(board, .2, self.training))
    def model():
        torch.manual_seed(3)
        return Dropping(4, 8, 1)
    class Stop(Exception): pass
    def stop(line): raise Stop
    whole = train(model(), *datasets(), SETTINGS, show=False)
    with pytest.raises(Stop): train(model(), *datasets(), SETTINGS, tmp_path, on_report=stop, show=False)
    torch.rand(100)
    assert same(train(model(), *datasets(), SETTINGS, tmp_path, resume=True, show=False).model, whole.model)


def test_a_finished_training_is_left_as_it_is(tmp_path):
    train(make_network('16x2', 4), *datasets(), SETTINGS, tmp_path, show=False)
    before = (tmp_path/'checkpoint.pt').read_bytes()
    seen = []
    again = train(make_network('16x2', 4), *datasets(), SETTINGS, tmp_path, resume=True, on_report=seen.append, show=False)
    assert (tmp_path/'checkpoint.pt').read_bytes() == before and again.steps == 36 and len(seen) == 3


def test_more_patience_goes_on(tmp_path):
    settings = dict(epochs=12, warmup_steps=0, learning_rate=.05, schedule='constant')
    first = train(make_network('16x2', 4), *datasets(), TrainingSettings(**settings, patience=1), tmp_path, show=False)
    assert first.stopped_early and first.epochs < 12
    more = train(make_network('16x2', 4), *datasets(), TrainingSettings(**settings, patience=20), tmp_path, resume=True, show=False)
    assert more.epochs == 12 and more.history[:len(first.history)] == first.history


def test_a_training_that_diverges_leaves_the_good_checkpoint(tmp_path):
    class Broken(MadeUpPositions):
        def batch(self, rng):
            batch = super().batch(rng)
            if self.position == 6: batch['value'][0] = float('nan')
            return batch
    with pytest.raises(DivergedError, match='no longer a number at step 8'):
        train(make_network('16x2', 4), Broken(), None, SETTINGS, tmp_path, show=False)
    assert torch.load(tmp_path/'checkpoint.pt', weights_only=True)['step'] == 4


def test_one_directory_one_training(tmp_path):
    with file_lock(tmp_path/'train.lock'), pytest.raises(LockedError): train(make_network('16x2', 4), *datasets(), SETTINGS, tmp_path, show=False)


def test_other_data_are_refused(tmp_path):
    train(make_network('16x2', 4), *datasets(), SETTINGS, tmp_path, show=False)
    for data, pattern in ((MadeUpPositions(seed=7), 'seed'), (MadeUpPositions(batches=9), 'train.batches: 12 on disk, 9'),
                          (MadeUpPositions(batch_size=8), 'train.batch_size: 16 on disk, 8')):
        with pytest.raises(MismatchError, match=pattern): train(make_network('16x2', 4), data, datasets()[1], SETTINGS, tmp_path, resume=True, show=False)
    with pytest.raises(MismatchError, match='channels: 16 on disk, 32'):
        train(make_network('32x2', 4), *datasets(), SETTINGS, tmp_path, resume=True, show=False)


class Boom:
    def __reduce__(self): return os.mkdir, ('executed',)


def test_nothing_in_a_checkpoint_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(dict(network=Boom(), model={}), 'bad.pt')
    Path('plain.pt').write_bytes(pickle.dumps(Boom()))
    for name in ('bad.pt', 'plain.pt'):
        with pytest.raises(FormatError, match=f'{name}: not a checkpoint'): load_network(name)
    assert not Path('executed').exists()


@pytest.mark.parametrize('damage', [lambda b: b[:len(b) // 2], lambda b: b'', lambda b: b[:100] + bytes(200) + b[300:], lambda b: b'\0' * 4096,
                                    lambda b: b[:20_000] + bytes([b[20_000] ^ 1]) + b[20_001:]])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    train(make_network('16x2', 4), *datasets(), SETTINGS, tmp_path, show=False)
    path = tmp_path/'checkpoint.pt'
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(FormatError, match='checkpoint.pt'):
        train(make_network('16x2', 4), *datasets(), SETTINGS, tmp_path, resume=True, show=False)


def test_no_batch_at_all():
    with pytest.raises(UsageError, match='at least one batch'): train(make_network('16x2', 4), MadeUpPositions(batches=0), show=False)
    with pytest.raises(UsageError, match='directory is given'): train(make_network('16x2', 4), *datasets(), resume=True, show=False)


def test_the_package_is_light_to_import(python):
    done = python('-c', 'import sys, datatools.pool, datatools.pool.tuning; print([m for m in ("optuna", "sqlalchemy", "matplotlib.pyplot") if m in sys.modules])')
    assert done.stdout.strip() == '[]', done.stdout + done.stderr


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shards')
    return [write_shards(folder/'a', 1200), write_shards(folder/'b', 800, seed=1)]


@pytest.mark.parametrize('order', ['rounds', 'sequential'])
@pytest.mark.parametrize('workers', [0, 2])
def test_the_stream_of_shards_goes_on_too(tmp_path, shards, order, workers):
    settings = TrainingSettings(epochs=3, warmup_steps=5, report_every=7, checkpoint_every=1)
    def data():
        learn, check = create_datasets(shards, batch_size=64, pool_size=300, order=order, random_seed=4)
        return make_loader(learn, workers) if workers else learn, check
    whole = train(make_network('8x1', 4), *data(), settings, show=False)
    class Stop(Exception): pass
    class Stopping(Trainer):
        def learn(self, batch):
            if self.step == stop: raise Stop
            super().learn(batch)
    for stop in (10, len(data()[0]), 40):
        trainer = Stopping(make_network('8x1', 4), *data(), settings, tmp_path)
        trainer.prepare(resume=stop != 10)
        with pytest.raises(Stop): trainer.run(show=False)
    resumed = train(make_network('8x1', 4), *data(), settings, tmp_path, resume=True, show=False)
    assert same(resumed.model, whole.model) and resumed.steps == whole.steps == 3 * len(data()[0])
    assert [(line['train'], line['validation']) for line in resumed.history] == [(line['train'], line['validation']) for line in whole.history]


def test_workers_change_nothing(shards):
    settings = TrainingSettings(epochs=2, warmup_steps=5)
    def data(workers):
        learn, check = create_datasets(shards, batch_size=64, pool_size=300, random_seed=4)
        return make_loader(learn, workers) if workers else learn, check
    alone, shared = (train(make_network('8x1', 4), *data(workers), settings, show=False) for workers in (0, 2))
    assert same(alone.model, shared.model)


def test_create_datasets(shards, tmp_path):
    learn, check = create_datasets(shards, batch_size=64, random_seed=4, max_validation_examples=100)
    assert len(check) == 2 and check.plan.length == 100 and not check.enable_augmentation and learn.enable_augmentation
    assert [source.rows for source in learn.sources] == [1000, 600]
    halves, _ = create_datasets(shards, batch_size=64, random_seed=4, weights=[1, 1])
    assert halves.weights == [.5, .5]
    with pytest.raises(UsageError, match='weights'): create_datasets(shards, weights='nonsense')
    apart, other = create_datasets(shards[:1], validation_dirs=shards[1:], validation_shard_ranges=['0-1'], batch_size=64)
    assert apart.plan.length == 1200 and other.plan.length == 400
    with pytest.raises(UsageError, match='overlap'): create_datasets(shards, validation_dirs=shards[1:])
    with pytest.raises(UsageError, match='None without validation_dirs'): create_datasets(shards, validation_shard_ranges=['all'])
    with pytest.raises(MismatchError, match='data.train.seed: 4 on disk, 5'):
        for seed in (4, 5):
            learn, check = create_datasets(shards, batch_size=64, random_seed=seed)
            train(make_network('8x1', 4), learn, check, TrainingSettings(epochs=1), tmp_path, resume=True, show=False)
