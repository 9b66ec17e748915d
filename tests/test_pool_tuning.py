"""Studies across process boundaries: shared, killed, resumed."""
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from made_up_positions import MadeUpPositions, write_shards

from datatools.core import FormatError, MismatchError, UsageError
from datatools.pool.trainer import TrainingSettings
from datatools.pool.tuning import open_study, run_hyperparameter_tuning, run_hyperparameter_tuning_current_data

SPACE = {'learning_rate': (1e-4, 1e-1, 'log'), 'batch_size': [8, 16]}
SETTINGS = TrainingSettings(epochs=3, warmup_steps=5, checkpoint_every=4)
RUN = '''
import sys, torch
sys.path.insert(0, {tests!r})
from made_up_positions import MadeUpPositions
from datatools.pool.trainer import TrainingSettings
from datatools.pool.tuning import run_hyperparameter_tuning
torch.set_num_threads(1)
def make(parameters): return MadeUpPositions(batch_size=parameters['batch_size'], delay={delay}), MadeUpPositions(batches=3, seed=1)
run_hyperparameter_tuning(make, {directory!r}, {space!r}, trials={trials}, pruner='none', sampler={sampler!r}, network='8x1', board_size=4, show=False,
                          settings=TrainingSettings(epochs=3, warmup_steps=5, checkpoint_every=4))
'''


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make(parameters): return MadeUpPositions(batch_size=parameters.get('batch_size', 16)), MadeUpPositions(batches=3, seed=1)


def search(directory, trials, space=SPACE, make=make, **options):
    options = dict(dict(pruner='none', network='8x1', board_size=4, settings=SETTINGS, show=False), **options)
    return run_hyperparameter_tuning(make, directory, space, trials=trials, **options)


def start(directory, trials, delay=.02, space=SPACE, sampler='tpe'):
    code = RUN.format(tests=str(Path(__file__).parent), delay=delay, directory=str(directory), trials=trials, space=space, sampler=sampler)
    return subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'nothing came'
        time.sleep(.02)


def points(result): return [trial['parameters'] for trial in result.trials]


def test_a_study_that_is_continued_proposes_what_a_whole_one_does(tmp_path):
    whole = search(tmp_path/'whole', 11)
    for trials in (3, 9, 11): parts = search(tmp_path/'parts', trials)
    assert points(parts) == points(whole) and len({json.dumps(point) for point in points(whole)}) > 8
    assert [trial['score'] for trial in parts.trials] == [trial['score'] for trial in whole.trials]
    assert open_study(tmp_path/'parts') == parts
    assert str(parts).count('complete') == 11 and '<td>' in parts._repr_html_()


def test_two_processes_share_a_study(tmp_path):
    runs = [start(tmp_path, 7) for _ in range(2)]
    for run in runs:
        _, errors = run.communicate(timeout=120)
        assert run.returncode == 0, errors
    result = open_study(tmp_path)
    assert [trial['state'] for trial in result.trials] == ['complete'] * 7
    assert len({json.dumps(point) for point in points(result)}) == 7


def test_a_killed_trial_is_resumed_from_its_checkpoint(tmp_path):
    whole = search(tmp_path/'whole', 3)
    run = start(tmp_path/'killed', 3, delay=.05)
    wait_for(lambda: (tmp_path/'killed/trials/0001/checkpoint.pt').exists())
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=60)
    step = torch.load(tmp_path/'killed/trials/0001/checkpoint.pt', weights_only=True)['step']
    assert 0 < step < 36
    seen = []
    def watching(parameters):
        train, validation = make(parameters)
        load = train.load_state_dict
        train.load_state_dict = lambda state: (seen.append(state['position']), load(state))
        return train, validation
    resumed = search(tmp_path/'killed', 3, make=watching)
    assert len(seen) == 1 and points(resumed) == points(whole)
    assert [trial['score'] for trial in resumed.trials] == [trial['score'] for trial in whole.trials]
    assert sorted(path.name for path in (tmp_path/'killed/trials').iterdir() if path.is_dir())[:2] == ['0000', '0001']


def test_a_grid_is_done_once_whatever_happens(tmp_path):
    space = {'learning_rate': [1e-3, 1e-2], 'batch_size': [8, 16]}
    run = start(tmp_path, None, delay=.05, space=space, sampler='grid')
    wait_for(lambda: (tmp_path/'trials/0000/checkpoint.pt').exists())
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=60)
    result = search(tmp_path, None, space, sampler='grid')
    assert sorted(map(json.dumps, points(result))) == sorted(json.dumps({'learning_rate': rate, 'batch_size': size}) for rate in (1e-3, 1e-2) for size in (8, 16))
    assert len(search(tmp_path, None, space, sampler='grid').trials) == 4


def test_what_falls_behind_is_ended(tmp_path):
    space = {'learning_rate': [1e-9, 1e-2]}
    experiments = [{'learning_rate': 1e-2}] * 1 + [{'learning_rate': 1e-9}]
    result = search(tmp_path, 10, space, pruner='median', experiments=experiments)
    states = {trial['state'] for trial in result.trials}
    assert states == {'complete', 'pruned'} and result.best['parameters'] == {'learning_rate': 1e-2}
    assert all(trial['parameters'] == {'learning_rate': 1e-9} for trial in result.trials if trial['state'] == 'pruned')
    assert result.best_network().channels == 8
    hyperband = search(tmp_path/'hyperband', 6, space, pruner='hyperband')
    assert len(hyperband.trials) == 6


def test_a_trial_that_diverges_has_failed_and_the_search_goes_on(tmp_path):
    def broken(parameters):
        train, validation = make(parameters)
        if parameters['batch_size'] == 8: train.batch = lambda rng: dict(MadeUpPositions().batch(rng), value=torch.full((16, 1), float('nan')))
        return train, validation
    result = search(tmp_path, None, {'batch_size': [8, 16]}, broken, sampler='grid')
    assert sorted(trial['state'] for trial in result.trials) == ['complete', 'failed']
    assert 'no longer a number' in next(trial['error'] for trial in result.trials if trial['state'] == 'failed')


def test_another_error_stops_the_search_and_its_trial_comes_back(tmp_path):
    def missing(parameters): raise FormatError('shard_0001.records: gone')
    with pytest.raises(FormatError, match='gone'): search(tmp_path, 2, make=missing)
    result = search(tmp_path, 2)
    assert [trial['state'] for trial in result.trials] == ['complete'] * 2


def test_a_study_is_of_one_search(tmp_path):
    search(tmp_path, 1, data=dict(rows=100))
    with pytest.raises(MismatchError, match='data.rows: 100 on disk, 99 asked for'): search(tmp_path, 2, data=dict(rows=99))
    with pytest.raises(MismatchError, match='space.batch_size'): search(tmp_path, 2, {'learning_rate': (1e-4, 1e-1, 'log')}, data=dict(rows=100))
    with pytest.raises(UsageError, match="Did you mean 'median'"): search(tmp_path, 2, pruner='medain')
    with pytest.raises(UsageError, match='end of each epoch'): search(tmp_path, 2, settings=TrainingSettings(report_every=5))
    with pytest.raises(UsageError, match='experiments'): search(tmp_path, 2, experiments=[{'batch_size': 8}])


def test_no_new_trial_after_the_time_is_up(tmp_path):
    assert search(tmp_path, 5, timeout=0).trials == []


def test_shards(tmp_path):
    shards, space = [write_shards(tmp_path/'a', 800), write_shards(tmp_path/'b', 600, seed=1)], {'learning_rate': [1e-3, 1e-2], 'batch_size': [32, 64]}
    options = dict(sampler='grid', settings=TrainingSettings(epochs=2, warmup_steps=3), network='8x1', show=False, pool_size=300)
    result = run_hyperparameter_tuning_current_data(shards, tmp_path/'study', space, **options)
    assert len(result.finished) == 4 and result.best_network().board_size == 4
    with pytest.raises(MismatchError, match='data.train.pool_size: 300 on disk, 200'):
        run_hyperparameter_tuning_current_data(shards, tmp_path/'study', space, **dict(options, pool_size=200))
