"The commands as they are typed: from real audio to batches, what is printed, what is refused, and with which exit code"
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import soundfile
import torch
from typer.testing import CliRunner

from datatools.core import hash_file
from datatools.stft.__main__ import app
from datatools.stft.audio import read_audio
from datatools.stft.dataset import PrecomputedSTFTDataset
from datatools.loader import make_loader
from datatools.stft.store import StoreWriter, environment, item_offsets, open_store
from datatools.stft.transform import istft, snr_decibels

SMALL = ['--sample-rate', 8000, '--n-fft', 256, '--hop', 64, '--segment-seconds', .5, '--workers', 0]


def command(*arguments, code=0, say=''):
    "Run a command in this process: what it printed; an error is one line without a traceback"
    done = CliRunner().invoke(app, list(map(str, arguments)))
    if done.exception is not None and not isinstance(done.exception, SystemExit): raise done.exception
    assert done.exit_code == code, (done.exit_code, done.output)
    if not code: return done.stdout
    assert 'Traceback' not in done.stderr and say in done.stderr, done.stderr
    return done.stderr


def shell(line, folder, code=0):
    "Run a line as a user would"
    line = line.replace('python ', f'{sys.executable} ', 1)
    done = subprocess.run(line, shell=True, capture_output=True, text=True, errors='surrogateescape', cwd=folder, timeout=120)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done


@pytest.fixture
def corpus(tmp_path):
    "6 files of a second, and one that is none"
    for number in range(6):
        path = tmp_path/f'in/{number % 2}/{number}.wav'
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, np.random.default_rng(number).normal(0, .1, 8000), 8000)
    (tmp_path/'in/broken.wav').write_bytes(b'RIFF, but no more')
    return tmp_path/'in'


@pytest.fixture
def store(corpus, tmp_path):
    command('precompute', corpus, '--output-dir', tmp_path/'out', '--val-fraction', 0, *SMALL)
    return tmp_path/'out/train.lmdb'


# real audio


def test_from_real_audio_to_batches(shared_data, tmp_path):
    "Digits and music as a user types it; the datasets say and give back what went in"
    audio = shared_data/'audio'
    typed = f'python -m datatools.stft precompute "{audio}/spoken_digits" "{audio}/music" --output-dir data --sample-rate 22050 --n-fft 1024 --n-fft 512 --hop 256 --segment-seconds 1.5 --val-fraction 0.3'
    done = shell(typed, tmp_path)
    assert done.stdout.startswith('train ') and '\nval   ' in done.stdout and '0 refused' in done.stdout and not done.stderr
    assert verified(tmp_path/'data/train.lmdb') and verified(tmp_path/'data/val.lmdb')
    names = {path.name for path in audio.rglob('*') if path.suffix in ('.wav', '.ogg')}
    kept, counts = set(), []
    for side in ('train', 'val'):
        with environment(tmp_path/f'data/{side}.lmdb') as opened: kept |= {*opened.sources()}
        with PrecomputedSTFTDataset(tmp_path/f'data/{side}.lmdb') as dataset: counts.append(len(dataset))
    assert kept == names and counts[0] > counts[1] > 0
    with PrecomputedSTFTDataset(tmp_path/'data/train.lmdb', fields=['stft_1024'], view='complex') as dataset:
        for index in (0, len(dataset) // 2, -1):
            about = dataset.metadata(index)
            whole, _ = read_audio(next(audio.rglob(about['source'])), 22050, 1)
            start = round(about['start_seconds'] * 22050)
            wanted = np.zeros((1, 33075), np.float32)
            wanted[:, :whole[:, start:start + 33075].shape[1]] = whole[:, start:start + 33075]
            assert snr_decibels(wanted, istft(dataset[index]['stft_1024'], 256, 33075)) > 60
        batches = {}
        for workers in (0, 2):
            loader = make_loader(dataset, batch_size=16, workers=workers, shuffle=True, seed=3)
            batches[workers] = [{name: value.clone() for name, value in batch.items() if isinstance(value, torch.Tensor)} for batch in loader]
            loader.close()
        assert len(batches[0]) >= counts[0] // 16 and len(batches[0]) == len(batches[2])
        for left, right in zip(*batches.values()): assert {*left} == {*right} and all(torch.equal(left[name], right[name]) for name in left)


def verified(path): return 'problems                         0' in command('verify', path)


def test_an_interrupted_run_goes_on(tmp_path):
    "Ctrl-C: exit code 130, one line, no process and no spool left; --resume ends with the bytes of a run in one go"
    for number in range(12):
        (tmp_path/'in').mkdir(exist_ok=True)
        soundfile.write(tmp_path/f'in/{number:02}.wav', np.random.default_rng(number).normal(0, .1, 44_100 * 20), 44_100)
    line = [sys.executable, '-m', 'datatools.stft', 'precompute', 'in', '--val-fraction', '0', '--segment-seconds', '1', '--workers', '2', '--progress']
    process = subprocess.Popen([*line, '--output-dir', 'out'], cwd=tmp_path, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    while not [*(tmp_path/'out').glob('.spool-*/*')]: time.sleep(.005)
    workers = [child for child in psutil.Process(process.pid).children(recursive=True) if 'spawn_main' in ' '.join(child.cmdline())]
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    out, err = process.communicate(timeout=60)
    assert process.returncode in (130, -signal.SIGINT) and not out and 'Traceback' not in err
    assert err.splitlines()[-1].startswith('Interrupted. What was committed is safe') and '--resume' in err
    assert not [worker for worker in workers if worker.is_running()] and not [*(tmp_path/'out').glob('.spool*')]
    done = subprocess.run([*line, '--output-dir', 'out', '--resume', '--json'], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert json.loads(done.stdout)['train']['items'] == 240
    subprocess.run([*line, '--output-dir', 'again', '--workers', '0'], cwd=tmp_path, capture_output=True, check=True, timeout=120)
    assert hash_file(tmp_path/'out/train.lmdb/data.mdb') == hash_file(tmp_path/'again/train.lmdb/data.mdb')


# what is printed


def test_json_is_all_there_is_on_stdout(corpus, tmp_path):
    done = shell(f'python -m datatools.stft precompute in --output-dir out {" ".join(map(str, SMALL))} --val-fraction 0.4 --json --progress', tmp_path)
    summary = json.loads(done.stdout)
    assert {*summary} == {'train', 'val', 'left_out', 'items_now', 'seconds', 'times_real_time'}
    assert summary['train']['items'] + summary['val']['items'] == summary['items_now'] == 12
    assert {**summary['train']['reasons'], **summary['val']['reasons']}.keys() == {'broken.wav'}
    assert 'precompute' in done.stderr and 'file' in done.stderr  # the bar
    for side in ('train', 'val'):
        info = json.loads(command('info', tmp_path/f'out/{side}.lmdb', '--json'))
        assert info['items'] == summary[side]['items'] and info['complete'] is True and info['stft']['windows'] == [256]
        assert info['reasons'] == summary[side]['reasons'] and info['audio_seconds'] == summary[side]['audio_seconds']
        assert json.loads(command('verify', tmp_path/f'out/{side}.lmdb', '--json'))['problems'] == []


def test_people_read_numbers_and_reasons(corpus, tmp_path):
    said = command('precompute', corpus, '--output-dir', tmp_path/'out', '--val-fraction', 0, *SMALL)
    assert said.splitlines()[0] == 'train 12 items, 7 files, 1 refused, 6.0 audio seconds' and 'refused: broken.wav: is cut off' in said
    said = command('info', tmp_path/'out/train.lmdb')
    assert 'refused: broken.wav: is cut off' in said and 'stft_256 float16[1, 129, 63, 2]' in said and 'items                            12' in said
    assert 'items now                        0' in command('precompute', corpus, '--output-dir', tmp_path/'out', '--val-fraction', 0, *SMALL, '--resume')


def test_many_refused_files_are_not_all_listed(tmp_path):
    for number in range(30): (tmp_path/f'{number}.wav').touch()
    soundfile.write(tmp_path/'sound.wav', np.zeros(8000), 8000)
    said = command('precompute', tmp_path, '--output-dir', tmp_path/'out', *SMALL, '--val-fraction', 0)
    assert said.count('is empty') == 20 and 'and 10 more' in said
    assert command('info', tmp_path/'out/train.lmdb').count('is empty') == 30


def test_names_that_no_terminal_can_show(tmp_path):
    (tmp_path/'in').mkdir()
    (tmp_path/'in'/os.fsdecode(b'latin\xe9.wav')).touch()
    soundfile.write(tmp_path/'in/sound.wav', np.zeros(8000), 8000)
    done = shell(f'python -m datatools.stft precompute in --output-dir out {" ".join(map(str, SMALL))} --val-fraction 0 --json', tmp_path)
    assert os.fsdecode(b'latin\xe9.wav') in json.loads(done.stdout)['train']['reasons'] and not done.stderr
    assert 'is empty' in shell('python -m datatools.stft info out/train.lmdb', tmp_path).stdout


@pytest.mark.parametrize('stream', ['utf-8:strict', 'ascii:strict', 'latin-1:strict', 'utf-8:surrogateescape'])
def test_names_that_the_output_refuses(tmp_path, monkeypatch, stream):
    "The work is done: what cannot be printed must not end it"
    monkeypatch.setenv('PYTHONIOENCODING', stream)
    names = [os.fsdecode(b'latin\xe9.wav'), '\u2615.wav']
    (tmp_path/'in').mkdir()
    for name in names: (tmp_path/'in'/name).touch()
    soundfile.write(tmp_path/'in/sound.wav', np.zeros(8000), 8000)
    line = f'python -m datatools.stft precompute in {" ".join(map(str, SMALL))} --val-fraction 0 --output-dir'
    for done in (shell(f'{line} out --json', tmp_path), shell('python -m datatools.stft info out/train.lmdb --json', tmp_path)):
        found = json.loads(done.stdout)
        assert {*found.get('train', found)['reasons']} == {*names} and not done.stderr
    for done in (shell(f'{line} again', tmp_path), shell('python -m datatools.stft info out/train.lmdb', tmp_path)):
        assert done.stdout.count('.wav: is empty') == 2 and not done.stderr


def test_a_window_is_as_long_as_its_transform(corpus, tmp_path):
    small = ['precompute', corpus, *SMALL[:2], *SMALL[4:], '--val-fraction', 0, '--output-dir']
    command(*small, tmp_path/'a', '--n-fft', 256, '--win', 128, code=2, say='--n-fft 256 and --win 128 are not allowed together')
    assert not (tmp_path/'a').exists()
    for folder, more in (('b', ['--win', 128]), ('c', ['--n-fft', 128, '--win', 128])):
        command(*small, tmp_path/folder, *more)
        assert open_store(tmp_path/folder/'train.lmdb').config['stft']['windows'] == [128]


def test_nothing_came_of_it(tmp_path):
    "All files refused is a failure, an empty store is told of"
    for name in 'abc':
        (tmp_path/'in').mkdir(exist_ok=True)
        (tmp_path/f'in/{name}.wav').touch()
    line = ['precompute', tmp_path/'in', '--output-dir', tmp_path/'out', *SMALL]
    for more in ([], ['--resume'], ['--resume', '--json']): command(*line, *more, code=1, say='out holds no item: all of the files were refused')
    soundfile.write(tmp_path/'in/d.wav', np.zeros(8000), 8000)
    line[3] = tmp_path/'again'
    for share, side in ((.000001, 'val'), (1, 'train')):
        done = CliRunner().invoke(app, list(map(str, [*line, '--val-fraction', share])))
        assert done.exit_code == 0 and f'{line[3].name}/{side}.lmdb has no items' in done.stderr
        line[3] = tmp_path/'once more'
    done = CliRunner().invoke(app, list(map(str, [*line, '--val-fraction', 0, '--output-dir', tmp_path/'none asked for'])))
    assert done.exit_code == 0 and not done.stderr


def test_verify_shows_its_progress(store):
    done = CliRunner().invoke(app, ['verify', str(store), '--progress'])
    assert done.exit_code == 0 and 'verify' in done.stderr and '12/12' in done.stderr
    assert not CliRunner().invoke(app, ['verify', str(store), '--no-progress']).stderr


def test_options_come_through(corpus, tmp_path):
    (tmp_path/'list.txt').write_text('0/2.wav\n')
    (tmp_path/'labels.csv').write_text('file,label\n0/0.wav,kick\n')
    command('precompute', corpus/'0', corpus/'1', '--output-dir', tmp_path/'flat', *SMALL, '--stereo', '--dtype', 'float32', '--n-fft', 128, '--keep-audio', '--durability', 'full', '--map-size', 1 << 20)
    command('precompute', corpus, '--output-dir', tmp_path/'out', *SMALL, '--val-list', tmp_path/'list.txt', '--metadata', tmp_path/'labels.csv')
    with environment(tmp_path/'out/val.lmdb') as opened: assert [*opened.sources()] == ['0/2.wav']
    with environment(tmp_path/'out/train.lmdb') as opened: assert opened.record(0).metadata['label'] == 'kick'
    info = open_store(tmp_path/'flat/train.lmdb')
    assert info.config['stft'] == dict(sample_rate=8000, windows=[256, 128], hop_length=64, channels=2, segment_seconds=.5, dtype='float32')
    assert info.schema.names == ('stft_256', 'stft_256_scale', 'stft_128', 'stft_128_scale', 'audio')
    assert info.schema.shapes['stft_128'] == (2, 65, 63, 2) and info.schema.shapes['audio'] == (2, 4000)


# what is refused


@pytest.mark.parametrize('arguments, code, said', [
    (['precompute'], 2, 'INPUTS'), (['precompute', 'in'], 2, '--output-dir'), (['precompute', 'nowhere', '--output-dir', 'out'], 2, "INPUTS='nowhere' is not allowed"),
    (['precompute', 'empty', '--output-dir', 'out'], 2, 'There is no audio file in it'), (['precompute', 'in', '--output-dir', 'out', '--hop', 4096], 2, '--hop=4096'),
    (['precompute', 'in', '--output-dir', 'out', '--n-fft', 1001], 2, '--n-fft='), (['precompute', 'in', '--output-dir', 'out', '--n-fft', 256, '--n-fft', 256], 2, '--n-fft='),
    (['precompute', 'in', '--output-dir', 'out', '--dtype', 'int8'], 2, '--dtype'), (['precompute', 'in', '--output-dir', 'out', '--sample-rate', 0], 2, '--sample-rate=0'),
    (['precompute', 'in', '--output-dir', 'out', '--segment-seconds', .001], 2, '--segment-seconds=0.001'), (['precompute', 'in', '--output-dir', 'out', '--workers', -1], 2, '--workers=-1'),
    (['precompute', 'in', '--output-dir', 'out', '--workers', 0, '--timeout', 3], 2, '--timeout=3.0'), (['precompute', 'in', '--output-dir', 'out', '--device', 'tpu'], 2, '--device='),
    (['precompute', 'in', '--output-dir', 'out', '--val-fraction', 2], 2, '--val-fraction=2.0'), (['precompute', 'in', '--output-dir', 'out', '--val-list', 'nowhere.txt'], 2, 'nowhere.txt'),
    (['precompute', 'in', '--output-dir', 'out', '--metadata', 'nowhere.csv'], 2, 'nowhere.csv'), (['precompute', 'in', '--output-dir', 'notes.txt'], 1, 'notes.txt'),
    (['precompute', 'in', '--output-dir', 'out', '--map-size', 1], 2, '--map-size=1'), (['info', 'nowhere'], 2, "STORE='nowhere' is not allowed"), (['verify', 'in'], 1, 'There is no store here'),
    (['info', 'notes.txt'], 1, 'notes.txt'), (['precomput'], 2, 'precomput'), (['info', 'in', '--yaml'], 2, '--yaml')], ids=str)
def test_wrong_arguments(corpus, tmp_path, monkeypatch, arguments, code, said):
    (tmp_path/'empty').mkdir()
    (tmp_path/'notes.txt').write_text('nothing to do with it' * 1000)
    monkeypatch.chdir(tmp_path)
    error = command(*arguments, code=code, say=said)
    assert error.startswith('Usage: ') or error.startswith('Error: ') and error.count('\n') == 1


def test_a_directory_with_stores(store, corpus, tmp_path):
    before = hash_file(store/'data.mdb')
    for more, code, said in (([], 2, '--output-dir='), (['--resume', '--hop', 32], 1, 'hop_length: 64 on disk, 32 asked for')):
        command('precompute', corpus, '--output-dir', tmp_path/'out', '--val-fraction', 0, *SMALL, *more, code=code, say=said)
    command('precompute', corpus, '--output-dir', tmp_path/'out', '--val-fraction', 0, *SMALL, '--resume', '--retry-refused', '--skip', 'broken.wav')
    assert open_store(store).complete and 'broken.wav: was left out by name' in command('info', store)
    before = hash_file(store/'data.mdb')
    (corpus/'new.wav').touch()
    command('precompute', corpus, '--output-dir', tmp_path/'out', '--val-fraction', 0, *SMALL, '--resume', code=1, say='new.wav: (none) before')
    assert hash_file(store/'data.mdb') == before


def test_damage_is_found(store):
    offsets, lengths = item_offsets(store)
    sound = (store/'data.mdb').read_bytes()
    def with_bytes(place, content):
        (store/'data.mdb').write_bytes(sound[:place] + content + sound[place + len(content):])
        return command('verify', store, code=1)
    said = with_bytes(int(offsets[3] + lengths[3] // 2), b'no spectrum')
    assert 'item 3: ' in said and said.splitlines()[-1].startswith('Error: ')
    assert 'item 5: ' in with_bytes(int(offsets[5]), b'!')
    (store/'data.mdb').write_bytes(sound[:-8192])
    for name in ('info', 'verify'): command(name, store, code=1, say='cut short')
    (store/'data.mdb').write_bytes(sound)
    assert verified(store)


def test_random_damage_never_crashes_verify(store, tmp_path):
    "Whatever bytes of the database are changed: a clear answer"
    sound, chance = (store/'data.mdb').read_bytes(), np.random.default_rng(0)
    code = 'import sys; from typer.testing import CliRunner; from datatools.stft.__main__ import app\n'
    code += 'for path in sys.argv[1:]:\n done = CliRunner().invoke(app, ["verify", path]); print(done.exit_code, flush=True)\n'
    code += ' if done.exception and not isinstance(done.exception, SystemExit): raise done.exception\n'
    tree = [page for page in range(len(sound) // 4096) if page < 2 or sound[page * 4096 + 10] in (1, 2)]
    for number in range(40):
        damaged = bytearray(sound)
        for _ in range(chance.integers(1, 20)): damaged[chance.choice(tree) * 4096 + chance.integers(200)] = chance.integers(256)
        (tmp_path/f'{number}.mdb').write_bytes(damaged)
    done = subprocess.run([sys.executable, '-c', code, *(tmp_path/f'{number}.mdb' for number in range(40))], capture_output=True, text=True, timeout=120)
    answers = done.stdout.split('\n')[:-1]
    assert done.returncode == 0 and len(answers) == 40, (done.returncode, answers[-1:], done.stderr[-2000:])
    assert answers.count('1') > 10


def test_a_store_that_someone_else_wrote(tmp_path):
    "Configurations and facts are theirs"
    with StoreWriter(tmp_path/'store', ['a list']) as writer:
        writer.source('a', 'refused for a reason')
        writer.source('b', dict(refused=dict(why=3)))
        writer.complete(path='mine', items=7)
    for name in ('info', 'verify'): assert 'store' in command(name, tmp_path/'store')
    info = json.loads(command('info', tmp_path/'store', '--json'))
    assert info['items'] == 0 and info['path'] == str(tmp_path/'store')


def test_an_incomplete_store_is_no_sound_one(tmp_path):
    with StoreWriter(tmp_path/'store', {}): pass
    assert 'complete                         False' in command('info', tmp_path/'store')
    command('verify', tmp_path/'store', code=1, say='not complete')
