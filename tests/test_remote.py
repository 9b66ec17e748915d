"Files at URLs: nothing half is ever visible, an interrupted transfer goes on, bytes are the same"
import io
import json
import os
import subprocess
import sys

import fsspec
import pytest
import soundfile
from fsspec.implementations.memory import MemoryFileSystem

from datatools import remote
from datatools.core import DatatoolsError, FormatError, Manifest, MismatchError, UsageError, rng_for
from datatools.groove.events import GrooveConfig
from datatools.groove.train import FileList, train_model
from datatools.pool import StreamingMixedShardDataset
from datatools.pool.legacy import convert
from datatools.remote import is_url, list_files, local_copy, read_at, stage_in, stage_out, staging_folder
from datatools.stft import PrecomputedSTFTDataset, STFTConfig
from datatools.stft.precompute import PrecomputeOptions, precompute
from datatools.testing import write_drum_corpus
from datatools.vst import ChunkedDatasetReader
from datatools.vst.config import make_config
from datatools.vst.generate import generate
from test_pool_legacy import game, write as write_legacy


class _Breaking(io.BytesIO):
    "A file whose second half never comes"
    def __init__(self, content, fault):
        super().__init__(content)
        self.half, self.fault = len(content) // 2, fault

    def read(self, size=-1):
        if self.tell() >= self.half: raise self.fault
        return super().read(min(self.half - self.tell(), size if size >= 0 else self.half))


class FaultyFileSystem(MemoryFileSystem):
    "Memory, with a line that breaks in the middle of the transfers whose number is in `breaks`"
    protocol, store, pseudo_dirs, breaks, transfers, sent = 'faulty', {}, [''], set(), 0, []

    @classmethod
    def _strip_protocol(cls, path): return super()._strip_protocol(path.removeprefix('faulty://'))
    def unstrip_protocol(self, name): return f'faulty://{name.lstrip("/")}'

    def _breaks_now(self):
        type(self).transfers += 1
        return self.transfers in self.breaks

    def put_file(self, lpath, rpath, **options):
        content = open(lpath, 'rb').read()
        if self._breaks_now():
            self.pipe_file(rpath, content[:len(content) // 2])
            raise ConnectionResetError('the line broke')
        self.sent.append(rpath)
        self.pipe_file(rpath, content)

    def open(self, path, mode='rb', **options):
        if mode == 'rb' and self._breaks_now(): return _Breaking(self.cat_file(path), ConnectionResetError('the line broke'))
        return io.BytesIO(self.store[self._strip_protocol(path)].getvalue()) if mode == 'rb' else super().open(path, mode, **options)

    def cat_file(self, path, *args, **options): return self.store[self._strip_protocol(path)].getvalue()


@pytest.fixture
def faulty(monkeypatch):
    fsspec.register_implementation('faulty', FaultyFileSystem, clobber=True)
    FaultyFileSystem.store.clear()
    FaultyFileSystem.sent.clear()
    FaultyFileSystem.breaks, FaultyFileSystem.transfers = set(), 0
    monkeypatch.setattr(remote, 'TRANSFERS', 1)  # in order, so that the number of a transfer says which it is
    return fsspec.filesystem('faulty')


@pytest.fixture(params=['memory', 'file'])
def place(request, tmp_path):
    "A directory at a URL"
    if request.param == 'file': return f'file://{tmp_path}/there'
    fsspec.filesystem('memory').store.clear()
    return 'memory://there'


def write_song(path, seconds, seed=0):
    "A sound file"
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, rng_for(seed).uniform(-.5, .5, int(16_000 * seconds)).astype('float32'), 16_000)


def write(folder, **contents):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items(): (folder/name.replace('_json', '.json')).write_bytes(content)
    return folder


def contents(folder): return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob('*') if path.is_file() and not any(part.startswith('.') for part in path.relative_to(folder).parts)}


def test_there_and_back(place, tmp_path):
    made = write(tmp_path/'made', a=b'1' * 1000, b=b'2' * 10, manifest_json=b'{}')
    write(made/'below', c=b'3')
    write(made/'.hidden', lock=b'')
    assert stage_out(made, place) == ['a', 'b', 'below/c', 'manifest.json']
    assert [*list_files(place)] == ['a', 'b', 'below/c', 'manifest.json']
    assert contents(stage_in(place, tmp_path/'copy')) == contents(made)
    assert stage_out(made, place) == [] == stage_out(stage_in(place, tmp_path/'copy'), place)  # nothing is sent twice, nor what came from there
    assert read_at(f'{place}/below/c') == b'3'


def test_changes_are_noticed(place, tmp_path):
    made = write(tmp_path/'made', a=b'first', b=b'second', manifest_json=b'{}')
    stage_out(made, place)
    copy = stage_in(place, tmp_path/'copy')
    os.utime(made/'b')  # the same content
    write(made, a=b'FIRST')
    assert stage_out(made, place) == ['a', 'manifest.json']
    (copy/'b').write_bytes(b'SECOND')  # somebody wrote to the copy
    assert contents(stage_in(place, copy)) == contents(made)


def test_a_file_with_a_name_of_its_own(place, tmp_path):
    made = write(tmp_path/'made', a=b'content')
    assert stage_out(made/'a', f'{place}/other') == ['a'] and stage_out(made/'a', f'{place}/other') == []
    assert stage_in(f'{place}/other', tmp_path/'copy').read_bytes() == b'content'


def test_broken_upload(faulty, tmp_path):
    made = write(tmp_path/'made', a=b'1' * 100, b=b'2' * 100, c=b'3' * 100, manifest_json=b'{"a": 1}')
    for broken in (2, 4):  # in the middle of b, then of the manifest
        faulty.store.clear()
        for note in made.glob('.remote/*'): note.unlink()
        FaultyFileSystem.breaks, FaultyFileSystem.transfers = {broken}, 0
        with pytest.raises(DatatoolsError, match='the line broke.*try again'): stage_out(made, 'faulty://out')
        visible = list_files('faulty://out')
        assert 'manifest.json' not in visible and all(each.size == 100 for each in visible.values())
        sent = stage_out(made, 'faulty://out')
        assert sent[-1] == 'manifest.json' and not {*sent} & {*visible}  # what had arrived was not sent again
        assert {name.removeprefix('/out/'): faulty.cat_file(name) for name in faulty.store} == contents(made)  # and nothing else is there


def test_leftovers_of_a_killed_upload_go(faulty, tmp_path):
    made = write(tmp_path/'made', a=b'1' * 100, manifest_json=b'{}')
    faulty.pipe_file('/out/.a.0123abcd.part', b'1' * 50)
    assert list_files('faulty://out') == {}
    stage_out(made, 'faulty://out')
    assert sorted(faulty.store) == ['/out/a', '/out/manifest.json']


def test_no_manifest_while_data_are_replaced(faulty, tmp_path):
    made = write(tmp_path/'made', a=b'1' * 100, manifest_json=b'{}')
    stage_out(made, 'faulty://out')
    write(made, a=b'2' * 100)
    FaultyFileSystem.breaks, FaultyFileSystem.transfers = {1}, 0
    with pytest.raises(DatatoolsError): stage_out(made, 'faulty://out')
    assert [*list_files('faulty://out')] == ['a'] and faulty.cat_file('/out/a') == b'1' * 100
    stage_out(made, 'faulty://out')
    assert [*list_files('faulty://out')] == ['a', 'manifest.json'] and faulty.cat_file('/out/a') == b'2' * 100


def test_an_object_store_needs_no_rename(faulty, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, 'OBJECT_STORES', {'faulty'})
    stage_out(write(tmp_path/'made', a=b'1' * 100, manifest_json=b'{}'), 'faulty://out')
    assert faulty.sent == ['/out/a', '/out/manifest.json']


def test_broken_download(faulty, tmp_path):
    faulty.pipe({'/in/a': b'1' * 100, '/in/b': b'2' * 100, '/in/manifest.json': b'{}'})
    FaultyFileSystem.breaks = {2}
    with pytest.raises(DatatoolsError, match='in/b could not be fetched'): stage_in('faulty://in', tmp_path/'copy')
    assert contents(tmp_path/'copy') == dict(a=b'1' * 100)  # nothing half, and no manifest
    FaultyFileSystem.transfers = 0
    FaultyFileSystem.breaks = set()
    stage_in('faulty://in', tmp_path/'copy')
    assert FaultyFileSystem.transfers == 2 and len(contents(tmp_path/'copy')) == 3


def test_a_shorter_object_than_listed_is_refused(faulty, tmp_path, monkeypatch):
    faulty.pipe_file('/in/a', b'1' * 100)
    monkeypatch.setattr(FaultyFileSystem, 'open', lambda self, path, mode='rb', **_: io.BytesIO(b'1' * 60))
    with pytest.raises(DatatoolsError, match='60 bytes came, 100 were listed'): stage_in('faulty://in/a', tmp_path/'copy')
    assert contents(tmp_path/'copy') == {}


def test_names_that_lead_out_of_the_folder(faulty, tmp_path):
    faulty.store['/in/../../outside'] = faulty.store['/in/a'] = None
    faulty.pipe_file('/in/a', b'1')
    faulty.store['/in/../../outside'] = faulty.store['/in/a']
    with pytest.raises(FormatError, match='leads out'): stage_in('faulty://in', tmp_path/'copy')
    assert not (tmp_path.parent/'outside').exists() and not (tmp_path/'outside').exists()


def test_errors(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match='Nothing is there'): stage_in('memory://nowhere', tmp_path)
    with pytest.raises(UsageError, match='exists'): stage_out(tmp_path/'nowhere', 'memory://out')
    with pytest.raises(UsageError, match='pip install s3fs'):
        monkeypatch.setattr(fsspec.core, 'url_to_fs', lambda url: (_ for _ in ()).throw(ImportError('no module')))
        stage_in('s3://bucket/name', tmp_path)


def test_copies_of_data_sets(tmp_path, monkeypatch):
    monkeypatch.setenv('DATATOOLS_STAGE', str(tmp_path/'stage'))
    fsspec.filesystem('memory').pipe('/set/manifest.json', json.dumps({}).encode())
    copy = local_copy('memory://set')
    assert copy == local_copy('memory://set/') == staging_folder('memory://set') and (copy/'manifest.json').exists()
    assert staging_folder('memory://set').stat().st_uid == os.getuid() and not is_url(str(copy))


def run_command(module, *arguments, **environment):
    return subprocess.run([sys.executable, '-m', module, *map(str, arguments)], capture_output=True, text=True, env=dict(os.environ, **environment))


def test_groove_counts_a_corpus_at_a_url(tmp_path):
    write_drum_corpus(tmp_path/'corpus', 12)
    (tmp_path/'list.txt').write_text(''.join(f'file://{path}\n' for path in sorted((tmp_path/'corpus').rglob('*.mid'))))
    def counted(name, files):
        train_model(files, tmp_path/name, GrooveConfig())
        return (tmp_path/name).read_bytes()
    here = counted('here', FileList.from_directory(tmp_path/'corpus'))
    assert here == counted('there', FileList.from_directory(f'file://{tmp_path}/corpus')) == counted('pattern', FileList.from_directory(f'file://{tmp_path}/corpus/*.mid'))
    assert len(here) == len(counted('listed', FileList.from_file(f'file://{tmp_path}/list.txt')))
    done = run_command('datatools.groove', 'train', f'file://{tmp_path}/corpus', '-o', tmp_path/'command', '--workers', 2)
    assert done.returncode == 0 and (tmp_path/'command').read_bytes() == here, done.stderr
    with pytest.raises(UsageError, match='a directory with MIDI files'): FileList.from_directory(f'file://{tmp_path}/nowhere')


def test_a_store_that_does_not_answer_stops_the_count(faulty, tmp_path, monkeypatch):
    faulty.pipe_file('/in/a.mid', b'')
    def refuse(self, path, **_): raise ConnectionResetError('the line broke')
    monkeypatch.setattr(FaultyFileSystem, 'cat_file', refuse)
    with pytest.raises(DatatoolsError, match='the line broke'): train_model(FileList.from_directory('faulty://in'), tmp_path/'m.groove', GrooveConfig())  # and does not call the file unreadable


def test_audio_at_a_url_makes_the_same_stores(tmp_path):
    for number in range(3): write_song(tmp_path/f'audio/{number}.wav', seconds=1, seed=number)
    (tmp_path/'audio'/'bad.wav').write_bytes(b'no audio')
    made = {}
    for name, source in dict(here=tmp_path/'audio', there=f'file://{tmp_path}/audio').items():
        summary = precompute(str(source), tmp_path/name, STFTConfig(16_000, segment_seconds=.5), val_fraction=.3, options=PrecomputeOptions(workers=1 if name == 'there' else 0))
        made[name] = [(tmp_path/name/side/'data.mdb').read_bytes() for side in ('train.lmdb', 'val.lmdb')], [summary[side]['reasons'] for side in ('train', 'val')]
    assert made['here'] == made['there']
    again = precompute(f'file://{tmp_path}/audio', tmp_path/'there', STFTConfig(16_000, segment_seconds=.5), val_fraction=.3, resume=True)
    assert again['items_now'] == 0
    write_song(tmp_path/'audio/0.wav', seconds=1, seed=9)  # as many bytes, another content
    with pytest.raises(MismatchError, match='0.wav'): precompute(f'file://{tmp_path}/audio', tmp_path/'there', STFTConfig(16_000, segment_seconds=.5), val_fraction=.3, resume=True)


def test_shards_at_a_url(tmp_path, faulty, monkeypatch):
    monkeypatch.setenv('DATATOOLS_STAGE', str(tmp_path/'stage'))
    (tmp_path/'old').mkdir()
    rng = rng_for(1)
    for number in range(3): write_legacy(tmp_path/f'old/shuffled_{number:04}.pkl.gz', game(rng, number))
    convert(tmp_path/'old', tmp_path/'here', 0, rows_per_shard=20)
    faulty.pipe({f'/old/{path.name}': path.read_bytes() for path in (tmp_path/'old').iterdir()})
    FaultyFileSystem.breaks = {5}  # three downloads, then the second upload
    with pytest.raises(DatatoolsError, match='could not be sent'): convert('faulty://old', 'faulty://new', 0, rows_per_shard=20)
    assert Manifest.name not in list_files('faulty://new')
    FaultyFileSystem.breaks = set()
    convert('faulty://old', 'faulty://new', 0, rows_per_shard=20)
    assert {name: faulty.cat_file(f'/new/{name}') for name in list_files('faulty://new')} == contents(tmp_path/'here')
    with pytest.raises(UsageError, match='where nothing is'): convert('faulty://old', 'faulty://new', 0, False, 20)
    monkeypatch.setenv('DATATOOLS_STAGE', str(tmp_path/'another machine'))
    convert('faulty://old', 'faulty://new', 0, rows_per_shard=20)
    rows = [len([*StreamingMixedShardDataset([place], random_seed=1, pool_size=100)]) for place in ('faulty://new', tmp_path/'here')]
    assert rows[0] == rows[1] > 0


def test_sounds_at_a_url(tmp_path, faulty, monkeypatch):
    monkeypatch.setenv('DATATOOLS_STAGE', str(tmp_path/'stage'))
    def config(place): return make_config(dict(output_dir=str(place), plugin_path='builtin', param_set='builtin', num_samples=6, samples_per_file=2, sample_rate=16_000, duration_seconds=.2, num_workers=1))
    def chunks(files): return {name: content for name, content in files.items() if name.endswith('.h5')}
    generate(config(tmp_path/'here'))
    FaultyFileSystem.breaks = {2}
    with pytest.raises(DatatoolsError, match='dataset.*could not be sent'): generate(config('faulty://out'))
    there = list_files('faulty://out')
    assert chunks(there) and Manifest.name not in there and len(chunks(there)) < 3
    with pytest.raises(UsageError, match='where nothing is'): generate(config('faulty://out'))
    FaultyFileSystem.breaks = set()
    assert generate(config('faulty://out'), resume=True)['rendered_now'] == 0
    assert chunks({name: faulty.cat_file(f'/out/{name}') for name in list_files('faulty://out')}) == chunks(contents(tmp_path/'here'))
    monkeypatch.setenv('DATATOOLS_STAGE', str(tmp_path/'another machine'))
    with ChunkedDatasetReader('faulty://out') as reader: assert len(reader) == 6 and reader.manifest['complete']
    assert generate(config('faulty://out'), resume=True)['rendered_now'] == 0


def test_a_store_at_a_url_is_opened(tmp_path, monkeypatch):
    monkeypatch.setenv('DATATOOLS_STAGE', str(tmp_path/'stage'))
    write_song(tmp_path/'audio/a.wav', seconds=1)
    precompute(tmp_path/'audio', tmp_path/'made', STFTConfig(16_000), val_fraction=0, options=PrecomputeOptions(0))
    with PrecomputedSTFTDataset(f'file://{tmp_path}/made/train.lmdb') as there, PrecomputedSTFTDataset(tmp_path/'made/train.lmdb') as here:
        assert len(there) == 1 and all((there[0][name] == here[0][name]).all() for name in here.fields)


def test_commands_take_urls(tmp_path):
    (tmp_path/'old').mkdir()
    write_legacy(tmp_path/'old/shuffled_0000.pkl.gz', game(rng_for(1)))
    done = run_command('datatools.pool', 'convert', f'file://{tmp_path}/old', '-o', f'file://{tmp_path}/new', '--json', DATATOOLS_STAGE=str(tmp_path/'stage'))
    assert done.returncode == 0 and json.loads(done.stdout)['path'] == f'file://{tmp_path}/new' and (tmp_path/'new'/Manifest.name).exists(), done.stderr
    settings = [f'{key}={value}' for key, value in dict(num_samples=1, sample_rate=16_000, duration_seconds=.2, plugin_path='builtin', param_set='builtin').items()]
    done = run_command('datatools.vst', 'generate', '--config', 'original_config.yaml', *(each for setting in settings for each in ('--set', setting)),
                       '-o', f'file://{tmp_path}/sounds', DATATOOLS_STAGE=str(tmp_path/'stage'))
    assert done.returncode == 0 and (tmp_path/'sounds'/Manifest.name).exists(), done.stderr
