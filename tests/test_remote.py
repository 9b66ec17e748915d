"Files at URLs: nothing half is ever visible, an interrupted transfer goes on, bytes are the same"
import io
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
import soundfile
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from datatools import remote
from datatools.core import DatatoolsError, FormatError, LockedError, Manifest, MismatchError, UsageError, rng_for
from datatools.groove.events import GrooveConfig
from datatools.groove.files import FileList
from datatools.groove.train import train_model
from datatools.pool import StreamingMixedShardDataset
from datatools.pool.hex import HexCodec
from datatools.pool.legacy import convert
from datatools.pool.play import GameSource, make_shards
from datatools.pool.shards import ShardDirectory
from datatools.remote import check_stage, claimed, file_system, is_url, list_files, local_copy, output_at, read_at, sending, stage_in, stage_out, staging_folder
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

    def cat_file(self, path, *args, **options):
        try: return self.store[self._strip_protocol(path)].getvalue()
        except KeyError: raise FileNotFoundError(path) from None


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
    if request.param == 'file': yield f'file://{tmp_path}/there'
    else:
        yield 'memory://there'
        fsspec.filesystem('memory').store.clear()  # which all tests of a process share
        fsspec.filesystem('memory').pseudo_dirs[:] = ['']


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
    (made/'job.lock').touch()
    assert stage_out(made, place) == ['a', 'b', 'below/c', 'manifest.json']
    assert [*list_files(place)] == ['a', 'b', 'below/c', 'manifest.json']
    assert contents(stage_in(place, tmp_path/'copy')) | {'job.lock': b''} == contents(made)
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


@pytest.fixture
def quick(monkeypatch, tmp_path):
    "Moments in place of minutes, and a disk of our own"
    monkeypatch.setattr(remote, 'SETTLE', .02)
    monkeypatch.setattr(remote, 'RENEWAL', .02)
    monkeypatch.setenv('DATATOOLS_STAGE', str(tmp_path/'stage'))


HOLD = 'import sys, time\nfrom datatools.remote import output_at\nwith output_at(sys.argv[1], True): print("in", flush=True); time.sleep(100)'


def hold(url, **environment):
    "A program that works on output at a URL until it is killed"
    process = subprocess.Popen([sys.executable, '-c', HOLD, url], stdout=subprocess.PIPE, text=True, env=dict(os.environ, **environment))
    assert process.stdout.readline() == 'in\n'
    return process


def test_two_programs_at_one_url(tmp_path, monkeypatch, caplog):
    (tmp_path/'old').mkdir()
    write_legacy(tmp_path/'old/shuffled_0000.pkl.gz', game(rng_for(1)))
    url = f'file://{tmp_path}/new'
    first = hold(url, DATATOOLS_STAGE=str(tmp_path/'another disk'))
    try:
        done = run_command('datatools.pool', 'convert', tmp_path/'old', '-o', url, DATATOOLS_STAGE=str(tmp_path/'stage'))
        assert done.returncode == 1 and f'is being written by process {first.pid} of ' in done.stderr and 'Wait until it has finished' in done.stderr, done.stderr
        assert list_files(url) == {} and not [*(tmp_path/'new').glob('[!.]*')]
    finally: first.kill()
    os.waitid(os.P_PID, first.pid, os.WEXITED | os.WNOWAIT)  # it waits to be buried, which is no life
    monkeypatch.setattr(remote, 'SETTLE', .02)
    monkeypatch.setenv('DATATOOLS_STAGE', str(tmp_path/'stage'))
    began = time.monotonic()
    convert(tmp_path/'old', url, 0)
    assert time.monotonic() - began < 20 and 'taken over from process' in caplog.text and Manifest.name in list_files(url)
    assert not (tmp_path/'new'/'.claim.json').exists()
    first.wait()


def test_two_programs_in_one_staging_folder(place, quick, tmp_path):
    stage_out(write(tmp_path/'made', a=b'1', manifest_json=b'{}'), place)
    with pytest.raises(LockedError, match='not claimed|no longer claimed'), output_at(place, True):
        claim_of(place).unlink() if is_file(place) else fsspec.filesystem('memory').rm('/there/.claim.json')  # by somebody who did not ask
        for attempt in (lambda: output_at(place, True).__enter__(), lambda: local_copy(place)):
            with pytest.raises(LockedError, match='by a program on this machine'): attempt()
    with output_at(place, True) as folder: assert contents(folder) == dict({'manifest.json': b'{}'}, a=b'1')


def is_file(url): return url.startswith('file://')
def claim_of(url, name='.claim.json'): return Path(url.removeprefix('file://'))/name


def foreign(path, **facts):
    "A claim of somebody else"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(token='theirs', host='node7', machine='another', process=os.getpid(), user='ann', since='noon') | facts))
    return path


def test_a_claim_of_another_host_ends_by_the_clock_of_the_store(quick, tmp_path, caplog, monkeypatch):
    url, info = f'file://{tmp_path}/out', LocalFileSystem.info
    monkeypatch.setattr(LocalFileSystem, 'info', lambda *arguments, **options: (facts := info(*arguments, **options)) | dict(mtime=facts['mtime'] - 86400))  # which is behind
    claim = foreign(claim_of(url), since='2999-01-01')  # and whose own is ahead
    for age in (0, remote.STALE - 60):
        os.utime(claim, (time.time() - age,) * 2)
        with pytest.raises(LockedError, match=rf'process \d+ of ann on node7.*last sign of life ({age:.0f}|{age + 1:.0f}) s ago.*void when 300 s'), claimed(url): pass
        assert json.loads(claim.read_text())['token'] == 'theirs'
    os.utime(claim, (time.time() - remote.STALE - 1,) * 2)
    with claimed(url) as mine:
        mine.check()
        assert 'taken over from process' in caplog.text and 'node7' in caplog.text
    assert not [*claim.parent.iterdir()]


def test_a_claim_of_this_host_ends_with_its_process(quick, tmp_path):
    url, ours, parent = f'file://{tmp_path}/out', remote._machine(), os.getppid()
    alive = dict(machine=ours, process=parent, began=remote._began(parent))
    foreign(claim_of(url), **alive)
    with pytest.raises(LockedError, match=f'process {parent} of ann'), claimed(url): pass
    for dead in (dict(alive, began=1), dict(alive, process=os.getpid()), dict(alive, process=2**22 + 1)):  # the number was given away; a block of ours that could not clean up; none has it
        foreign(claim_of(url), **dead)
        with claimed(url): pass
    foreign(claim_of(url), **dict(alive, process='1', began=None))  # nonsense
    with pytest.raises(LockedError), claimed(url): pass
    claim_of(url).write_bytes(b'')  # it is being written
    with pytest.raises(LockedError, match='another program'), claimed(url): pass


def test_a_claim_shows_signs_of_life(quick, tmp_path, monkeypatch):
    monkeypatch.setattr(remote, 'STALE', .3)
    url = f'file://{tmp_path}/out'
    with claimed(url):
        time.sleep(.5)
        assert json.loads(claim_of(url).read_text())['renewed'] > 2
        with pytest.raises(LockedError, match='last sign of life 0 s'), claimed(url): pass


@pytest.mark.parametrize('file', [False, True])
def test_who_lost_its_claim_sends_nothing(place, quick, tmp_path, file):
    store, name = file_system(place)[0], '.there.claim.json' if file else 'there/.claim.json'
    theirs = f'{file_system(place)[1].rpartition("/")[0]}/{name}'
    with pytest.raises(LockedError, match='no longer claimed.*process 1 of ann'), sending(place, False, file) as output:
        part = output.path if file else output.path/'a'
        part.write_bytes(b'1')
        store.pipe_file(theirs, json.dumps(dict(token='theirs', process=1, user='ann')).encode())  # while we were asleep
        if not file:
            output.send(part)
            while not output.sent[0].done(): time.sleep(.01)
            output.send(part)  # work ends here, where it would be for nothing
            pytest.fail('it goes on')
    assert list_files(place) == {} and json.loads(store.cat_file(theirs))['token'] == 'theirs'
    assert part.read_bytes() == b'1'
    store.rm_file(theirs)
    with output_at(place, True, file): pass
    assert len(list_files(place)) == 1


@pytest.mark.parametrize('trouble', [DatatoolsError, KeyboardInterrupt])
def test_after_trouble_the_work_is_kept_and_the_claim_is_gone(place, quick, trouble):
    with pytest.raises(trouble), output_at(place, False) as folder:
        (folder/'a').write_bytes(b'1')
        raise trouble('stop')
    assert list_files(place) == {} and not file_system(place)[0].exists(f'{place}/.claim.json')
    with output_at(place, False) as folder: assert contents(folder) == dict(a=b'1')
    assert [*list_files(place)] == ['a']
    with pytest.raises(UsageError, match='where nothing is'), output_at(place, False): pass


def test_a_file_and_what_lies_beside_it(place, quick):
    url = f'{place}/drums.groove'
    with output_at(url, False, file=True) as path:
        for name in ('drums.groove', 'drums.groove.skipped.jsonl', 'drums.groove.lock', 'other', '.drums.groove.tmp'): (path.parent/name).write_bytes(name.encode())
        write(path.parent/'drums.groove.checkpoints', a=b'')
        with pytest.raises(LockedError), output_at(url, True, file=True): pass
        with output_at(f'{place}/bass.groove', False, file=True): pass  # is another output
    assert [*list_files(place)] == ['drums.groove', 'drums.groove.skipped.jsonl']
    with pytest.raises(UsageError, match='where nothing is'), output_at(url, False, file=True): pass
    for wrong, file, there in ((place, True, 'A directory'), (url, False, 'A file')):
        with pytest.raises(UsageError, match=f'{there} is there'), output_at(wrong, True, file): pass


def only_one_wins(url):
    "Three programs at the same moment"
    tried = threading.Barrier(3)
    def attempt(_):
        try:
            with claimed(url) as claim:
                tried.wait(5)
                claim.check()
        except LockedError as error:
            tried.wait(5)
            return error
    with ThreadPoolExecutor(3) as threads: ends = [*threads.map(attempt, range(3))]
    assert sorted(isinstance(end, LockedError) for end in ends) == [False, True, True], ends


def test_a_folder_says_who_is_first(quick, tmp_path, monkeypatch):
    exists, pauses = LocalFileSystem.exists, [.3, .2, .1]
    monkeypatch.setattr(LocalFileSystem, 'exists', lambda *arguments, **options: (exists(*arguments, **options), time.sleep(pauses.pop() if pauses else 0))[0])  # who looks first and then writes is too late
    only_one_wins(f'file://{tmp_path}/out')


class CarelessFileSystem(FaultyFileSystem):
    "A store that makes an object again, that does not know the word, or that tells no times"
    protocol, store, fault, slow = 'careless', {}, None, 0

    @classmethod
    def _strip_protocol(cls, path): return MemoryFileSystem._strip_protocol(path.removeprefix('careless://'))
    def unstrip_protocol(self, name): return f'careless://{name.lstrip("/")}'

    def pipe_file(self, path, value, mode='overwrite', **_):
        if mode == 'create' and self.fault: raise self.fault
        time.sleep(self.slow)
        super().pipe_file(path, value)

    def info(self, path, **_): return {key: value for key, value in super().info(path).items() if key != 'created'}


@pytest.mark.parametrize('fault', [None, NotImplementedError('mode'), OSError(22, 'PreconditionFailed')])
def test_a_store_that_does_not_say_who_is_first(quick, monkeypatch, fault):
    fsspec.register_implementation('careless', CarelessFileSystem, clobber=True)
    CarelessFileSystem.store.clear()
    monkeypatch.setattr(CarelessFileSystem, 'fault', fault)
    monkeypatch.setattr(CarelessFileSystem, 'slow', .005)
    monkeypatch.setattr(remote, 'SETTLE', .1)
    for _ in range(2):
        only_one_wins('careless://out')
        assert not CarelessFileSystem.store
    CarelessFileSystem.store.clear()
    fsspec.filesystem('careless').pipe_file('/out/.claim.json', b'{"token": "theirs", "host": "node7"}')
    with pytest.raises(LockedError, match=r'on node7.*remove careless://out/\.claim\.json'), claimed('careless://out'): pass  # nobody can know how old it is


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


def test_directories_with_manifests_of_their_own(faulty, quick, tmp_path):
    made = write(tmp_path/'made', ledger=b'1')
    for name in 'xy': write(made/name, a=name.encode() * 100, manifest_json=b'{}')
    assert stage_out(made, 'faulty://out') == ['ledger', 'x/a', 'y/a', 'x/manifest.json', 'y/manifest.json']
    assert ['manifest' in name for name in FaultyFileSystem.sent] == [False] * 3 + [True] * 2
    write(made/'x', a=b'2' * 100)
    FaultyFileSystem.breaks, FaultyFileSystem.transfers = {1}, 0
    with pytest.raises(DatatoolsError): stage_out(made, 'faulty://out')
    assert [*list_files('faulty://out')] == ['ledger', 'x/a', 'y/a', 'y/manifest.json']  # what is whole stays so
    with output_at('faulty://out', True) as folder: assert sorted(contents(folder)) == ['y/a', 'y/manifest.json']  # and only that is fetched
    assert stage_out(made, 'faulty://out') == ['x/a', 'x/manifest.json']


def test_games_at_a_url(quick, tmp_path, monkeypatch):
    sources, url = [GameSource('a', 6), GameSource('b', 6)], f'file://{tmp_path}/there'
    for output in (tmp_path/'here', url): made = make_shards(output, sources, HexCodec(4), 3, workers=0, show_progress=False)
    assert [len(directory) for directory in made] == [len(ShardDirectory.open(tmp_path/'there'/name)) for name in 'ab']
    def shards(folder): return {name: content for name, content in contents(folder).items() if 'ledger' not in name}  # which has times
    assert shards(tmp_path/'here') == shards(tmp_path/'there')
    monkeypatch.setenv('DATATOOLS_STAGE', str(tmp_path/'another machine'))
    make_shards(url, sources, HexCodec(4), 3, workers=0, show_progress=False)
    assert shards(tmp_path/'here') == shards(tmp_path/'there')


def test_workers_elsewhere_need_a_folder_that_all_see(tmp_path, monkeypatch):
    monkeypatch.delenv('DATATOOLS_STAGE', raising=False)
    with pytest.raises(UsageError, match='DATATOOLS_STAGE=None.*all machines of the cluster'): convert(tmp_path, 'memory://new', engine='tcp://scheduler:8786')
    for here in (('memory://new', 'dask'), ('memory://new', 'local'), (tmp_path, 'tcp://scheduler:8786')): check_stage(*here)
    monkeypatch.setenv('DATATOOLS_STAGE', str(tmp_path))
    check_stage('memory://new', 'tcp://scheduler:8786')


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
    def asked(*words): return subprocess.run([sys.executable, '-c', 'from datatools.cli import main; main()', *words], capture_output=True, text=True, env=dict(os.environ, DATATOOLS_STAGE=str(tmp_path/'stage')))
    for tool, name in ('pool', 'new'), ('vst', 'sounds'):
        url = f'file://{tmp_path}/{name}'
        for words, said in ((tool, 'verify'), 'sound'), ((tool, 'info'), ''), (('info', '--verify'), f'{url}: '):
            done = asked(*words, url)
            assert done.returncode == 0 and said in done.stdout, done.stdout + done.stderr
    done = asked('info', f'file://{tmp_path}/nowhere')
    assert (done.returncode, done.stderr) == (2, f"Error: PATH='file://{tmp_path}/nowhere' is not allowed: it must be a file or a directory with files in it. Nothing is there.\n")
