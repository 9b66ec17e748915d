"""`datatools info` on one of everything: whole, cut short, unfinished, and on what is nobody's."""
import json
import shlex
import shutil
import sqlite3
from dataclasses import replace

import h5py
import lmdb
import numpy as np
import pytest
import soundfile
from typer.testing import CliRunner

from datatools.cli import app
from datatools.core import Manifest
from datatools.groove import FileList, GrooveConfig, GrooveModel, Run, train_model, write_arpa, write_drums
from datatools.info import ARRAYS, FORMATS, describe
from datatools.jobs import run_tasks
from datatools.pool.hex import HexCodec
from datatools.pool.play import SOURCES, make_shards
from datatools.pool.shards import compress_directory
from datatools.stft import STFTConfig
from datatools.stft.precompute import precompute
from datatools.testing import write_drum_corpus
from datatools.vst.config import CONFIGS, GenerateConfig
from datatools.vst.generate import generate

CONFIG = GrooveConfig(order=3, min_notes=1, min_bytes=0)


def info(path, code=0):
    "The finding, by the command line"
    done = CliRunner().invoke(app, ['info', str(path), '--json'])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout) if code < 2 else done.stderr


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp('loops')
    write_drum_corpus(folder, 12)
    return folder


@pytest.fixture(scope='module')
def drums(corpus, tmp_path_factory):
    "A model of each store, and what its training leaves"
    folder = tmp_path_factory.mktemp('drums')
    for store in ('memory', 'memmap', 'sqlite'):
        run = Run(store=store, memmap_dir=folder/'memmap.counts', db_path=folder/'sqlite.sqlite', save_every=4)
        train_model(FileList.from_directory(corpus), folder/store, CONFIG, run)
    model = GrooveModel.load(folder/'memory')
    write_arpa(model, folder/'drums.arpa')
    write_drums(folder/'new.mid', model.generate(bars=2)[0])
    return folder


@pytest.fixture(scope='module')
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp('pool')
    made = make_shards(folder/'shards', [replace(source, games=20) for source in SOURCES[:2]], HexCodec(4), games_per_shard=5)
    compress_directory(made[0].path, folder/'packed')
    return folder


@pytest.fixture(scope='module')
def trained(shards):
    for command in (['train', '--epochs', 1, '--output-dir', shards/'net'], ['sweep', '--epochs', 1, '--trials', 1, '--output-dir', shards/'study']):
        done = CliRunner().invoke(app, ['pool', command[0], str(shards/'shards'), *map(str, command[1:]), '--network', '4x1', '--batch-size', '32', '--pool-size', '500'])
        assert done.exit_code == 0, done.output
    return shards


@pytest.fixture(scope='module')
def spectra(tmp_path_factory):
    folder = tmp_path_factory.mktemp('stft')
    (folder/'audio').mkdir()
    for number in range(4): soundfile.write(folder/f'audio/{number}.wav', np.random.default_rng(number).normal(0, .1, 11_025).astype('f4'), 22_050)
    precompute(folder/'audio', folder/'out', STFTConfig(sample_rate=22_050), val_fraction=.5)
    return folder


@pytest.fixture(scope='module')
def sounds(tmp_path_factory):
    folder = tmp_path_factory.mktemp('vst')
    generate(GenerateConfig(str(folder/'set'), num_samples=4, samples_per_file=2, duration_seconds=.5, sample_rate=16_000, isolation='none', num_workers=0, min_loudness=-120), show_progress=False)
    return folder


def whole(path, kind):
    "It is recognised and whole, also when all of it is read, and the snippet runs"
    found = info(path)
    assert (found['kind'], found['state']) == (kind, 'whole') and found['bytes'] > 0, found
    checked = describe(path, verify=True)
    assert checked.whole and checked.verified and checked._repr_html_().startswith('<table>'), checked
    if found['read'] and 'kenlm' not in found['read'] and 'unpacked' not in found['read']: exec(found['read'], {})
    return found


# ---- everything that is whole

@pytest.mark.parametrize('name, kind', [('memory', 'groove model'), ('memmap.counts', 'groove counts'), ('memmap.counts/order_2/shard_00000.counts', 'count shard'), ('sqlite.sqlite', 'groove counts database'),
    ('sqlite.checkpoints', 'groove checkpoints'), ('drums.arpa', 'ARPA language model'), ('new.mid', 'MIDI file'), ('', 'folder')])
def test_groove(drums, name, kind): whole(drums/name, kind)


@pytest.mark.parametrize('name, kind', [('shards', 'directories of pool shards'), ('shards/{0}', 'directory of pool shards'), ('shards/{0}/{1}', 'pool shard'), ('packed', 'packed pool shards'), ('shards/make_shards.ledger', 'ledger of a job')])
def test_shards(shards, name, kind):
    first = next(path for path in sorted((shards/'shards').iterdir()) if path.is_dir())
    whole(shards/name.format(first.name, next(first.glob('*.records')).name), kind)


@pytest.mark.parametrize('name, kind', [('net', 'pool training'), ('net/best.pt', 'pool network'), ('study', 'pool hyperparameter study')])
def test_trainings(trained, name, kind): whole(trained/name, kind)


@pytest.mark.parametrize('name, kind', [('out', 'STFT stores of a job'), ('out/train.lmdb', 'STFT store'), ('out/val.lmdb/data.mdb', 'STFT store')])
def test_stft(spectra, name, kind): whole(spectra/name, kind)


@pytest.mark.parametrize('name, kind', [('set', 'VST dataset'), ('set/dataset_0001.h5', 'VST chunk')])
def test_vst(sounds, name, kind): whole(sounds/name, kind)


@pytest.mark.parametrize('name, kind', [('original_config.yaml', 'VST configuration'), ('surge_simple.yaml', 'VST parameter set')])
def test_files_for_people(name, kind): whole(CONFIGS/name, kind)


# ---- unfinished

class Stopped(Exception): "As a kill, but in this process"


@pytest.mark.parametrize('store', ['memory', 'memmap', 'sqlite'])
def test_a_training_that_was_stopped(corpus, tmp_path, monkeypatch, store):
    from datatools.groove import train
    def stop(*_): raise Stopped
    monkeypatch.setattr(train, '_finish', stop)
    run = Run(store=store, memmap_dir=tmp_path/'drums.counts', db_path=tmp_path/'drums.sqlite', save_every=4)
    with pytest.raises(Stopped): train_model(FileList.from_directory(corpus), tmp_path/'drums', CONFIG, run)
    monkeypatch.undo()
    found = info(tmp_path/'drums.checkpoints/shard-0-of-1.checkpoint', 1)
    assert (found['kind'], found['state'], found['facts']['processed']) == ('groove checkpoint', 'unfinished', 8) and not found['damaged']
    for name in {'memory': [], 'memmap': ['drums.counts'], 'sqlite': ['drums.sqlite']}[store]: assert info(tmp_path/name, 1)['state'] == 'unfinished'
    assert found['resume'] == info(tmp_path/'drums.checkpoints', 1)['resume']
    done = CliRunner().invoke(app, found['resume'].split()[1:])  # what it says does what it says
    assert done.exit_code == 0 and info(tmp_path/'drums')['facts']['kept'] == 12, done.output


def test_a_model_of_one_shard_is_whole_and_waits_for_the_others(corpus, tmp_path):
    train_model(FileList.from_directory(corpus), tmp_path/'one', CONFIG, Run(shard_index=0, num_shards=2))
    found = info(tmp_path/'one')
    assert found['facts']['complete'] is False and 'groove merge' in found['resume']


def test_shards_without_a_manifest(shards, tmp_path):
    copy = shutil.copytree(shards/'shards', tmp_path/'shards')
    first = next(path for path in sorted(copy.iterdir()) if path.is_dir())
    (first/'manifest.json').unlink()
    for place in (copy, first): assert info(place, 1)['state'] == 'unfinished' and 'pool make-shards' in info(place, 1)['resume']


def test_a_conversion_that_was_stopped(tmp_path):
    list(run_tasks(abs, [('a', (-1,))], workers=0, ledger=tmp_path/'.conversion/ledger', ledger_config=dict(soft_policy=True, game_ids='file', source_number=0)))
    found = info(tmp_path, 1)
    assert (found['kind'], found['facts']['files_converted']) == ('conversion to pool shards', 1) and found['resume'].endswith('--resume --soft-policy --game-ids file')


def test_a_training_that_is_under_way(trained, tmp_path):
    copy = shutil.copytree(trained/'net', tmp_path/'net')
    (copy/'history.jsonl').unlink()
    found = info(copy, 1)
    assert found['state'] == 'unfinished' and found['resume'].endswith('--resume')


def test_stores_that_are_under_way(spectra, tmp_path):
    copy = shutil.copytree(spectra/'out', tmp_path/'out')
    shutil.rmtree(copy/'val.lmdb')
    found = info(copy, 1)
    assert found['unfinished'] == ['val.lmdb is missing'] and '--sample-rate 22050' in found['resume']
    done = CliRunner().invoke(app, found['resume'].replace('INPUTS...', str(spectra/'audio')).split()[1:] + ['--val-fraction', '.5'])
    assert done.exit_code == 0 and info(copy)['state'] == 'whole', done.output


def test_a_data_set_that_is_under_way(sounds, tmp_path):
    copy = shutil.copytree(sounds/'set', tmp_path/'set')
    (copy/'dataset_0001.h5').unlink()
    found = info(copy, 1)
    assert found['unfinished'] == ['dataset_0001.h5 is missing'] and 'vst generate' in found['resume']


def test_a_chunk_that_is_under_way(tmp_path):
    from datatools.vst.chunks import ChunkLayout, PartialChunk
    layout = ChunkLayout(samples=3, channels=1, frames=100, mel_shape=(1, 128, 2), param_count=2)
    chunk = PartialChunk.create(tmp_path/'dataset_0000.h5.partial', layout, 'x' * 64)
    chunk.write(1, np.zeros((1, 100), 'f4'), np.zeros((1, 128, 2), 'f4'), np.zeros(2, 'f4'), 60, 100, (0., 1.), -20., 0)
    chunk.close()
    found = info(tmp_path/'dataset_0000.h5.partial', 1)
    assert found['unfinished'] == ['1 of 3 samples are rendered'] and found['state'] == 'unfinished'


def test_a_demo(drums, tmp_path):
    asked = dict(seed=3, quick=True, sizes={}, drums='0123', plugin='/opt/my synth.vst3')
    manifest = Manifest.create(tmp_path/'demo', 'datatools demo', 1, asked)
    shutil.copy(drums/'memory', tmp_path/'demo/drums.groove')
    found = info(tmp_path/'demo', 1)
    assert found['unfinished'] == ['the demo has not ended'] and 'groove model, whole' in found['facts']['drums.groove']
    assert shlex.split(found['resume']) == ['datatools', 'demo', '--output-dir', str(tmp_path/'demo'), '--seed', '3', '--plugin', '/opt/my synth.vst3', '--quick', '--midi', 'DIR']
    manifest.update(complete=True)
    assert info(tmp_path/'demo')['kind'] == 'demo folder'


# ---- cut short

@pytest.mark.parametrize('part', [.3, .9])
def test_files_that_were_cut_short(drums, shards, trained, spectra, sounds, tmp_path, part):
    records = next((shards/'shards').glob('*/*.records'))
    for path, name in ((drums/'memory', 'model'), (drums/'sqlite.sqlite', 'counts.sqlite'), (drums/'drums.arpa', 'drums.arpa'), (records, 'x.records'), (spectra/'out/train.lmdb/data.mdb', 'data.mdb'),
                       (sounds/'set/dataset_0000.h5', 'dataset_0000.h5')):
        content = path.read_bytes()
        (tmp_path/name).write_bytes(content[:int(part * len(content))])
        found = describe(tmp_path/name, verify=True)
        assert found.state == 'damaged' and len(found.damaged[0].splitlines()) == 1, (name, found)
        assert CliRunner().invoke(app, ['info', str(tmp_path/name), '--verify']).exit_code == 1


def test_a_flipped_bit_is_found_by_verify(drums, spectra, tmp_path):
    content = bytearray((drums/'memory').read_bytes())
    content[200] ^= 1
    (tmp_path/'model').write_bytes(content)
    assert describe(tmp_path/'model').whole and describe(tmp_path/'model', verify=True).state == 'damaged'
    done = CliRunner().invoke(app, ['info', str(tmp_path/'model'), '--verify'])
    assert done.exit_code == 1 and 'checksum' in done.output


def test_all_that_is_missing_is_named(shards, tmp_path):
    first = next(path for path in sorted((shards/'shards').iterdir()) if path.is_dir())
    for source in (first, shards/'packed'):
        copy = shutil.copytree(source, tmp_path/source.name)
        gone = sorted(path for path in copy.iterdir() if '.records' in path.name)[:2]
        for path in gone: path.unlink()
        damaged = info(copy, 1)['damaged']
        assert len(damaged) == 2 and all(path.name in said for path, said in zip(gone, damaged))


def test_a_manifest_that_is_damaged(shards, sounds, tmp_path):
    for source in (next(path for path in sorted((shards/'shards').iterdir()) if path.is_dir()), sounds/'set'):
        copy = shutil.copytree(source, tmp_path/source.name)
        (copy/'manifest.json').write_text('{"format":')
        assert 'not a valid JSON' in str(info(copy, 1)['damaged'])


# ---- nobody's

def test_what_is_not_ours(tmp_path):
    (tmp_path/'notes.txt').write_text('hello')
    (tmp_path/'empty').touch()
    (tmp_path/'data.json').write_text('{"format": "something else"}')
    (tmp_path/'docker.yaml').write_text('services: {}')
    (tmp_path/'pickle.pkl').write_bytes(b'\x80\x04K\x01.')
    (tmp_path/'folder/inside').mkdir(parents=True)
    (tmp_path/'other').mkdir()
    (tmp_path/'other/manifest.json').write_text('{"format": "web extension"}')
    sqlite3.connect(tmp_path/'foreign.sqlite').executescript('CREATE TABLE t (x);')
    with h5py.File(tmp_path/'foreign.h5', 'w') as file: file['x'] = 1
    lmdb.open(str(tmp_path/'foreign.lmdb')).close()
    for path in sorted(tmp_path.iterdir()):
        said = info(path, 2)
        assert said.startswith('Error: ') and said.count('\n') == 1 and 'not recognised' in said, (path, said)
    assert 'These are: ' in info(tmp_path/'notes.txt', 2)
    assert info(tmp_path/'nowhere', 2).startswith("Error: PATH='")


def test_a_hostile_pickle_is_not_run(tmp_path):
    import zipfile
    ran = tmp_path/'ran'
    hostile = b"cposix\nsystem\n(S'touch " + str(ran).encode() + b"'\ntR.network model"
    with zipfile.ZipFile(tmp_path/'best.pt', 'w') as archive: archive.writestr('best/data.pkl', hostile)
    assert info(tmp_path/'best.pt', 1)['state'] == 'damaged' and not ran.exists()


def test_the_names_are_those_of_the_wings():
    from datatools.groove import model, train
    from datatools.pool import shards as pool_shards, trainer, tuning
    from datatools.stft import shards as stft_shards
    from datatools.vst import chunks
    assert {pool_shards.FORMAT, pool_shards.PACKED_FORMAT, trainer.FORMAT, tuning.FORMAT, stft_shards.FORMAT, chunks.FORMAT} == {*FORMATS} - {'datatools demo'}
    assert {model.MODEL_KIND, train.CHECKPOINT_KIND, pool_shards.KIND} <= {*ARRAYS}


def test_only_the_wing_that_is_needed_is_imported(drums, python):
    code = f"import sys; from datatools.info import describe; describe({str(drums/'memory')!r}); print([name for name in ('torch', 'lmdb', 'h5py') if name in sys.modules])"
    assert python('-c', code).stdout.strip() == '[]'
