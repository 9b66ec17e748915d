"""The pool's commands as a user meets them: what is wrong is said in one line with the name of the option, and nothing is left behind."""
import json
import logging

import pytest
from typer.testing import CliRunner

from datatools.pool.__main__ import app, shard_directories
from datatools.pool.hex import HexCodec
from datatools.pool.play import GameSource, make_shards


def command(*arguments, code=0):
    "What a command printed: the result, or the one line of its error"
    for handler in list(logging.getLogger().handlers): logging.getLogger().removeHandler(handler)
    done = CliRunner().invoke(app, [str(each) for each in arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit): raise done.exception
    assert done.exit_code == code, done.output
    if code: assert not done.stdout and done.stderr.startswith('Error: '), done.output
    return done.stderr if code else done.stdout


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    "Three directories of 100 games on a small board, with the default number of games in a shard"
    folder = tmp_path_factory.mktemp('cli')/'shards'
    command('make-shards', '--output-dir', folder, '--board-size', 5, '--games', 100, '--no-progress')
    return folder


QUICK = ('--network', '8x1', '--epochs', 1, '--batch-size', 256, '--pool-size', 1000, '--no-progress')


def test_few_games_still_make_several_shards(shards, tmp_path):
    assert [facts['shards'] for facts in json.loads(command('inspect', shards, '--json')).values()] == [10] * 3
    command('make-shards', '--output-dir', tmp_path/'one', '--board-size', 5, '--games', 20, '--games-per-shard', 20, '--no-progress')
    assert 'a single shard cannot be divided' in command('train', tmp_path/'one', '--output-dir', tmp_path/'net', *QUICK, code=2)
    assert not (tmp_path/'net').exists()
    assert command('make-shards', '--output-dir', tmp_path/'z', '--games', 0, code=2).startswith('Error: --games=0')
    assert command('make-shards', '--output-dir', tmp_path/'z', '--games-per-shard', 0, code=2).startswith('Error: --games-per-shard=0')


def test_a_training_among_the_shards(shards):
    "The output of a training in the directory of the data is none of the data"
    command('train', shards, '--output-dir', shards/'run', *QUICK)
    command('train', shards, '--output-dir', shards/'run', *QUICK, '--resume')
    command('sweep', shards, '--output-dir', shards/'sweep', *QUICK, '--trials', 1)
    assert [path.name for path in shard_directories([shards])] == ['mixed', 'random', 'strong']
    for name in ('inspect', 'verify'): assert [*json.loads(command(name, shards, '--json'))] == [str(shards/name) for name in ('mixed', 'random', 'strong')]
    assert 'Error: --row=3 is counted within one directory' in command('inspect', shards, '--row', 3, code=2)


def test_an_unfinished_directory_is_not_left_out(shards, tmp_path):
    (tmp_path/'d').mkdir()
    for name in ('random', 'strong'):
        (tmp_path/'d'/name).mkdir()
        for file in (shards/name).iterdir(): (tmp_path/'d'/name/file.name).symlink_to(file)
    (tmp_path/'d/strong/manifest.json').unlink()
    assert 'has not finished' in command('mix-report', tmp_path/'d', code=1)


def test_verify_names_all_that_is_wrong(shards, tmp_path):
    for directory in make_shards(tmp_path/'d', [GameSource('a', 10), GameSource('b', 10), GameSource('c', 10)], HexCodec(4), workers=0)[:2]:
        with open(directory.shards[3].path, 'r+b') as file:
            file.seek(70)
            file.write(b'\xFF')
    said = command('verify', tmp_path/'d', '--no-progress', code=1)
    assert 'a/shard_0003.records is damaged' in said and 'b/shard_0003.records is damaged' in said and '/c/' not in said


@pytest.mark.parametrize('device', ['foo', 'cuda:99'])
@pytest.mark.parametrize('name', ['train', 'sweep'])
def test_devices_that_are_not_there(shards, tmp_path, name, device):
    said = command(name, shards, '--output-dir', tmp_path/'out', *QUICK, '--device', device, code=2)
    assert said.startswith(f"Error: --device='{device}'") and said.count('\n') == 1
    assert not (tmp_path/'out').exists()


@pytest.mark.parametrize('arguments, message', [
    (['--network', 'foo'], "--network='foo'"), (['--network', '0x1'], '--network=0'), (['--weights', '1,2'], '--weights=[1.0, 2.0]'), (['--weights', 'many'], '--weights=many'),
    (['--shard-range', '5-1'] * 3, "--shard-range="), (['--epochs', 0], '--epochs=0'), (['--learning-rate', 'nan'], '--learning-rate=nan'),
    (['--pool-size', -1], '--pool-size=-1'), (['--max-memory-gb', 0], '--max-memory-gb=0'), (['--max-examples', -1], '--max-examples=-1'),
    (['--validation-fraction', 1], '--validation-fraction=1'), (['--batch-size', 0], '--batch-size=0'), (['--workers', -1], '--workers=-1')])
def test_errors_name_the_option(shards, tmp_path, arguments, message):
    assert command('train', shards, '--output-dir', tmp_path/'out', *QUICK, *arguments, code=2).startswith(f'Error: {message}')


def test_directories_that_are_not_there(tmp_path):
    for name in ('inspect', 'verify', 'mix-report', 'train'):
        more = ['--output-dir', tmp_path/'out'] if name == 'train' else []
        assert command(name, tmp_path/'nowhere', *more, code=2).startswith(f"Error: DIR{'S' if name in ('mix-report', 'train') else ''}=")


def test_orders_weights_and_workers(shards, tmp_path):
    said = command('train', shards, '--output-dir', tmp_path/'out', *QUICK, '--order', 'sequential', '--weights', '1,1,2', '--workers', 1, '--json')
    assert json.loads(said)['step'] > 5
    report = json.loads(command('mix-report', shards, '--weights', 'shards', '--pool-size', 500, '--batch-size', 64, '--max-memory-gb', 4, '--json'))
    assert report
    assert 'max_memory_gb=0.001' in command('mix-report', shards, '--max-memory-gb', .001, code=1)
